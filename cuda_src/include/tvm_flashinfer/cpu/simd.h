// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// SIMD lanes by compiler vector extensions: the widest float vector of the target that the file is
// compiled for. Intrinsics appear only where the compiler has no portable form (fp16, prefetch).
#ifndef TVM_FLASHINFER_CPU_SIMD_H_
#define TVM_FLASHINFER_CPU_SIMD_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../dtype.h"
#include "../variant.h"

namespace tvm_flashinfer {
namespace cpu {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;
#else
inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 16;
#endif

typedef float VFloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t VInt __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VHalfBits __attribute__((vector_size(kLanes * 2)));

inline constexpr float kInf = std::numeric_limits<float>::infinity();

// x - 0 is x, signed zeros too, and compiles to a plain broadcast; 0 + x does not.
inline VFloat Broadcast(float x) { return x - VFloat{}; }
inline VInt Broadcast(int32_t x) { return VInt{} + x; }

inline VInt Iota() {
  VInt v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

inline VFloat Load(const float* p) {
  VFloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void Store(float* p, VFloat v) { std::memcpy(p, &v, sizeof(v)); }

inline VFloat Load(const BFloat16* p) {
  VHalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  const VInt wide = __builtin_convertvector(bits, VInt) << 16;
  VFloat v;
  std::memcpy(&v, &wide, sizeof(v));
  return v;
}

inline VFloat Load(const Float16* p) {
#if defined(__AVX512F__)
  return (VFloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && defined(__AVX__)
  return (VFloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VFloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = ToFloat(p[i]);
  return v;
#endif
}

inline VFloat Select(VInt mask, VFloat a, VFloat b) { return mask ? a : b; }
inline VFloat Max(VFloat a, VFloat b) { return a > b ? a : b; }
inline VFloat Min(VFloat a, VFloat b) { return a < b ? a : b; }

/*! Lanes exchanged with the lane whose index differs in bit `kStep`. */
template <int kStep>
inline VFloat Butterfly(VFloat v) {
  return __builtin_shuffle(v, Iota() ^ kStep);
}
template <int kStep = kLanes / 2>
inline float ReduceAdd(VFloat v) {
  v += Butterfly<kStep>(v);
  if constexpr (kStep > 1) return ReduceAdd<kStep / 2>(v);
  return v[0];
}
template <int kStep = kLanes / 2>
inline float ReduceMax(VFloat v) {
  v = Max(v, Butterfly<kStep>(v));
  if constexpr (kStep > 1) return ReduceMax<kStep / 2>(v);
  return v[0];
}

/*!
 * \brief exp(x) within 2 ulp for x <= 0 and finite results, 0 below -87.3 and for -inf.
 *
 * Cephes' expf: x = n ln 2 + r, |r| <= ln 2 / 2, a degree-6 polynomial in r, scaled by 2^n.
 */
inline VFloat Exp(VFloat x) {
  constexpr float kLow = -87.3f;
  // In this order NaN passes through: a comparison with it is false.
  const VFloat y = Min(Broadcast(88.0f), Max(Broadcast(kLow), x));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const VFloat shifted = y * 1.44269504088896341f + kRound;
  const VFloat n = shifted - kRound;
  const VFloat r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  VFloat p = Broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  VInt bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const VInt scale = (bits << 23) + (127 << 23);
  VFloat two_n;
  std::memcpy(&two_n, &scale, sizeof(two_n));
  return Select(x < kLow, VFloat{}, p * two_n);
}

/*! \brief tanh(x), through exp; odd, saturating. */
inline VFloat Tanh(VFloat x) {
  const VFloat a = Max(x, -x);
  const VFloat e = Exp(-2.0f * a);
  const VFloat large = (1.0f - e) / (1.0f + e);
  const VFloat a2 = a * a;  // Taylor near zero, where 1 - e cancels
  const VFloat small = a * (1.0f - a2 * (0.333333333f - a2 * 0.133333333f));
  const VFloat t = Select(a < 0.08f, small, large);
  return Select(x < 0.0f, -t, t);
}

/*! Apply a scalar function lane by lane, where none is vectorised. */
template <typename Fn>
inline VFloat Map(VFloat x, const Fn& fn) {
  VFloat y;
  for (int i = 0; i < kLanes; ++i) y[i] = fn(x[i]);
  return y;
}

/*! \brief The vocabulary a variant is written in, see variant.h. */
struct SimdLanes {
  using Float = VFloat;
  using Int = VInt;
  using Mask = VInt;

  static Float F(float x) { return Broadcast(x); }
  static Int I(int32_t x) { return Broadcast(x); }
  static Mask B(bool x) { return Broadcast(x ? -1 : 0); }
  static Float ToFloat(Int x) { return __builtin_convertvector(x, VFloat); }
  static Int ToInt(Float x) { return __builtin_convertvector(x, VInt); }
  static Mask Not(Mask m) { return ~m; }
  static Float Select(Mask m, Float a, Float b) { return m ? a : b; }
  static Int Select(Mask m, Int a, Int b) { return m ? a : b; }
  static Float Min(Float a, Float b) { return cpu::Min(a, b); }
  static Float Max(Float a, Float b) { return cpu::Max(a, b); }
  static Int Min(Int a, Int b) { return a < b ? a : b; }
  static Int Max(Int a, Int b) { return a > b ? a : b; }
  static Int FloorDiv(Int a, Int b) {
    const Int q = a / b;  // rounds to zero; one less where the signs of rest and divisor differ
    return q + ((a - q * b != 0) & ((a < 0) != (b < 0)));
  }
  static Int FloorMod(Int a, Int b) { return a - FloorDiv(a, b) * b; }
  static Float LoadFloat(const VariantArg& arg, Int index) {
    Float v;
    for (int i = 0; i < kLanes; ++i) v[i] = static_cast<const float*>(arg.data)[index[i]];
    return v;
  }
  static Int LoadInt(const VariantArg& arg, Int index) {
    Int v;
    for (int i = 0; i < kLanes; ++i) v[i] = static_cast<const int32_t*>(arg.data)[index[i]];
    return v;
  }
  static Mask LoadBool(const VariantArg& arg, Int index) {
    Mask v;
    for (int i = 0; i < kLanes; ++i) {
      v[i] = static_cast<const uint8_t*>(arg.data)[index[i]] ? -1 : 0;
    }
    return v;
  }
  static Float Exp(Float x) { return cpu::Exp(x); }
  static Float Exp2(Float x) { return cpu::Exp(x * 0.693147181f); }
  static Float Tanh(Float x) { return cpu::Tanh(x); }
  static Float Sigmoid(Float x) { return 0.5f * cpu::Tanh(0.5f * x) + 0.5f; }
  static Float Abs(Float x) { return cpu::Max(x, -x); }
  static Float Sqrt(Float x) {
    return Map(x, [](float e) { return std::sqrt(e); });
  }
  static Float Log(Float x) {
    return Map(x, [](float e) { return std::log(e); });
  }
  static Float Sin(Float x) {
    return Map(x, [](float e) { return std::sin(e); });
  }
  static Float Cos(Float x) {
    return Map(x, [](float e) { return std::cos(e); });
  }
};

// Into L2: a core has too few L1 fill buffers for prefetches and the loads of this block at once.
inline void Prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_SIMD_H_
