// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// 16-bit storage types of the CPU backend and their conversions to float32.
#ifndef TVM_FLASHINFER_DTYPE_H_
#define TVM_FLASHINFER_DTYPE_H_

#include <cstdint>
#include <cstring>

namespace tvm_flashinfer {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float ToFloat(float x) { return x; }

inline float ToFloat(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof(f));
  return f;
}

inline float ToFloat(Float16 x) {
  // Shift the exponent and mantissa into place; rescaling rebases the exponent, subnormals too.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  uint32_t bits = magnitude;
  float f;
  if (magnitude >= (0x7c00u << 13)) {
    bits += (255u - 31u) << 23;  // inf, nan
    std::memcpy(&f, &bits, sizeof(f));
  } else {
    std::memcpy(&f, &bits, sizeof(f));
    f *= 0x1p112f;
  }
  return (x.bits & 0x8000) ? -f : f;
}

template <typename T>
T FromFloat(float x);

template <>
inline float FromFloat<float>(float x) {
  return x;
}

/*! \brief Round to nearest even; NaN stays NaN. */
template <>
inline BFloat16 FromFloat<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

/*! \brief Round to nearest even; overflow gives inf, NaN stays NaN. */
template <>
inline Float16 FromFloat<Float16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  uint16_t half;
  if (bits >= 0x47800000u) {  // 65536 and above, inf, nan
    half = bits > 0x7f800000u ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000u) {  // below the smallest normal: the float adder rounds for us
    float f;
    std::memcpy(&f, &bits, sizeof(f));
    f += 0.5f;  // ulp of [0.5, 1) is 2^-24, the subnormal step
    std::memcpy(&bits, &f, sizeof(bits));
    half = static_cast<uint16_t>(bits - 0x3f000000u);
  } else {
    half = static_cast<uint16_t>((bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1)) >> 13);
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_DTYPE_H_
