// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Storage types narrower than float32, and their conversions.
#ifndef TVM_FLASHINFER_DTYPE_H_
#define TVM_FLASHINFER_DTYPE_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"

namespace tvm_flashinfer {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
/*! \brief 4 exponent and 3 mantissa bits, no infinity (OCP OFP8, "e4m3fn"). */
struct Float8E4M3 {
  uint8_t bits;
};
/*! \brief 5 exponent and 2 mantissa bits: the upper half of a Float16. */
struct Float8E5M2 {
  uint8_t bits;
};
struct Int8 {
  int8_t value;
};
/*! \brief Two's complement integers in [-8, 7], two a byte; the even element is the low half. */
struct Int4 {
  uint8_t bits;
};

/*! \brief Elements that one object of a storage type holds. */
template <typename T>
constexpr int32_t kElementsPerUnit = std::is_same_v<T, Int4> ? 2 : 1;

TVM_FLASHINFER_HOST_DEVICE inline float ToFloat(float x) { return x; }

TVM_FLASHINFER_HOST_DEVICE inline float ToFloat(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof(f));
  return f;
}

TVM_FLASHINFER_HOST_DEVICE inline float ToFloat(Float16 x) {
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

TVM_FLASHINFER_HOST_DEVICE inline float ToFloat(Float8E5M2 x) {
  return ToFloat(Float16{static_cast<uint16_t>(x.bits << 8)});
}

TVM_FLASHINFER_HOST_DEVICE inline float ToFloat(Float8E4M3 x) {
  // As half the bits line up; the exponent's bias differs by 8.
  const uint16_t half = static_cast<uint16_t>((x.bits & 0x7f) << 7);
  const float magnitude =
      (x.bits & 0x7f) == 0x7f ? ToFloat(Float16{0x7e00}) : ToFloat(Float16{half}) * 256.0f;
  return (x.bits & 0x80) ? -magnitude : magnitude;
}

TVM_FLASHINFER_HOST_DEVICE inline float ToFloat(Int8 x) { return static_cast<float>(x.value); }

template <typename T>
TVM_FLASHINFER_HOST_DEVICE T FromFloat(float x);

template <>
TVM_FLASHINFER_HOST_DEVICE inline float FromFloat<float>(float x) {
  return x;
}

/*! \brief Round to nearest even; NaN stays NaN. */
template <>
TVM_FLASHINFER_HOST_DEVICE inline BFloat16 FromFloat<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // Without a branch, so that loops over it become vectors.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

/*! \brief Round to nearest even; overflow gives inf, NaN stays NaN. */
template <>
TVM_FLASHINFER_HOST_DEVICE inline Float16 FromFloat<Float16>(float x) {
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

namespace detail {

/*!
 * Round to nearest even an 8-bit float of kMantissa mantissa bits and the given exponent bias,
 * as bits without the sign; what exceeds the format gives a number above its largest.
 */
template <int kMantissa, int kBias>
TVM_FLASHINFER_HOST_DEVICE inline uint32_t RoundToFloat8(uint32_t magnitude) {
  constexpr uint32_t kSmallestNormal = (127u - kBias + 1) << 23;
  if (magnitude < kSmallestNormal) {  // the float adder rounds to the subnormal step
    float f;
    std::memcpy(&f, &magnitude, sizeof(f));
    constexpr uint32_t kAnchor = (127u - kBias + 1 + 23 - kMantissa) << 23;
    float anchor;
    std::memcpy(&anchor, &kAnchor, sizeof(anchor));
    f += anchor;
    std::memcpy(&magnitude, &f, sizeof(f));
    return magnitude - kAnchor;
  }
  constexpr int kDrop = 23 - kMantissa;
  const uint32_t rounded =
      magnitude + ((1u << (kDrop - 1)) - 1) + ((magnitude >> kDrop) & 1) - ((127u - kBias) << 23);
  return rounded >> kDrop;
}

TVM_FLASHINFER_HOST_DEVICE inline uint32_t FloatBits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

}  // namespace detail

/*! \brief Round to nearest even; what overflows becomes the largest value, NaN stays NaN. */
template <>
TVM_FLASHINFER_HOST_DEVICE inline Float8E4M3 FromFloat<Float8E4M3>(float x) {
  const uint32_t bits = detail::FloatBits(x), magnitude = bits & 0x7fffffffu;
  uint32_t narrow = 0x7f;
  if (magnitude <= 0x7f800000u) {
    narrow = magnitude >= 0x43e80000u ? 0x7e : detail::RoundToFloat8<3, 7>(magnitude);
  }
  return {static_cast<uint8_t>((bits >> 24 & 0x80) | narrow)};
}

/*! \brief Round to nearest even; what overflows becomes the largest finite value, NaN stays. */
template <>
TVM_FLASHINFER_HOST_DEVICE inline Float8E5M2 FromFloat<Float8E5M2>(float x) {
  const uint32_t bits = detail::FloatBits(x), magnitude = bits & 0x7fffffffu;
  uint32_t narrow = 0x7e;
  if (magnitude <= 0x7f800000u) {
    narrow = magnitude >= 0x47700000u ? 0x7b : detail::RoundToFloat8<2, 15>(magnitude);
  }
  return {static_cast<uint8_t>((bits >> 24 & 0x80) | narrow)};
}

/*! \brief Round to nearest even into [low, high]; NaN becomes 0. */
TVM_FLASHINFER_HOST_DEVICE inline float RoundToRange(float x, float low, float high) {
  x = x > low ? x : (x <= low ? low : 0.0f);
  x = x < high ? x : high;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  return (x + kRound) - kRound;
}

template <>
TVM_FLASHINFER_HOST_DEVICE inline Int8 FromFloat<Int8>(float x) {
  return {static_cast<int8_t>(RoundToRange(x, -128.0f, 127.0f))};
}

/*! \brief Store `count` (even for Int4) floats as T. */
template <typename T>
TVM_FLASHINFER_HOST_DEVICE inline void StoreRow(const float* from, int32_t count, T* to) {
  if constexpr (std::is_same_v<T, Int4>) {
    for (int32_t i = 0; i < count; i += 2) {
      const auto low = static_cast<int32_t>(RoundToRange(from[i], -8.0f, 7.0f));
      const auto high = static_cast<int32_t>(RoundToRange(from[i + 1], -8.0f, 7.0f));
      to[i / 2].bits = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
    }
  } else {
    for (int32_t i = 0; i < count; ++i) to[i] = FromFloat<T>(from[i]);
  }
}

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_DTYPE_H_
