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

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "../dtype.h"

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
typedef uint32_t VUInt __attribute__((vector_size(kLanes * 4)));
typedef uint8_t VByteBits __attribute__((vector_size(kLanes)));
typedef int8_t VSignedBytes __attribute__((vector_size(kLanes)));
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
#if defined(__AVX512F__)  // the compiler's own conversion goes through two halves
  const VInt wide = (VInt)_mm512_cvtepu16_epi32((__m256i)bits) << 16;
#else
  const VInt wide = __builtin_convertvector(bits, VInt) << 16;
#endif
  VFloat v;
  std::memcpy(&v, &wide, sizeof(v));
  return v;
}

inline VFloat HalfToFloat(VHalfBits bits) {
#if defined(__AVX512F__)
  return (VFloat)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__) && defined(__AVX__)
  return (VFloat)_mm256_cvtph_ps((__m128i)bits);
#else
  VFloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = ToFloat(Float16{bits[i]});
  return v;
#endif
}

inline VFloat Load(const Float16* p) {
  VHalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return HalfToFloat(bits);
}

inline VFloat Load(const Float8E5M2* p) {
  VByteBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return HalfToFloat(__builtin_convertvector(bits, VHalfBits) << 8);
}

inline VFloat Load(const Float8E4M3* p) {
  VByteBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  const VHalfBits wide = __builtin_convertvector(bits, VHalfBits);
  const VHalfBits magnitude = wide & 0x7f;
  // As half the bits line up; the exponent's bias differs by 8. The largest magnitude is NaN.
  const VHalfBits nan = (VHalfBits)(magnitude == 0x7f) & 0x7e00;
  return HalfToFloat((wide & 0x80) << 8 | magnitude << 7 | nan) * 256.0f;
}

inline VFloat Load(const Int8* p) {
  VSignedBytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, VInt), VFloat);
}

/*! Elements [2 i, 2 i + kLanes) from unit i on. */
inline VFloat Load(const Int4* p) {
  VByteBits packed = {}, unit;
  std::memcpy(&packed, p, kLanes / 2);
  for (int i = 0; i < kLanes; ++i) unit[i] = static_cast<uint8_t>(i / 2);
  const VInt pairs = __builtin_convertvector(__builtin_shuffle(packed, unit), VInt);
  const VInt half = (Iota() & 1) * 4;
  return __builtin_convertvector((pairs >> half) << 28 >> 28, VFloat);
}

/*! Elements [d, d + kLanes) of a row of kDim, zero past its end. */
template <int kDim, typename T>
inline VFloat LoadRow(const T* row, int d) {
  constexpr int kUnit = kElementsPerUnit<T>;
  if (kDim % kLanes == 0 || d + kLanes <= kDim) return Load(row + d / kUnit);
  T tail[kLanes / kUnit] = {};
  std::memcpy(tail, row + d / kUnit, kDim % kLanes / kUnit * sizeof(T));
  return Load(tail);
}

inline VFloat Select(VInt mask, VFloat a, VFloat b) { return mask ? a : b; }
inline VFloat Max(VFloat a, VFloat b) { return a > b ? a : b; }
inline VFloat Min(VFloat a, VFloat b) { return a < b ? a : b; }

/*! Lanes exchanged with the lane whose index differs in bit `kStep`. */
template <int kStep>
inline VFloat Butterfly(VFloat v) {
  return __builtin_shuffle(v, Iota() ^ kStep);
}

/*! Every lane of a group of kGroup neighbours becomes the largest of them. */
template <int kGroup, int kStep = 1>
inline VFloat MaxOfGroups(VFloat v) {
  if constexpr (kStep < kGroup) return MaxOfGroups<kGroup, 2 * kStep>(Max(v, Butterfly<kStep>(v)));
  return v;
}

/*! Lane i of the result is the sum of the lanes of v[i]: fewer operations than a sum each. */
template <int kStep = kLanes / 2>
inline VFloat AddLanes(VFloat* v) {
  // Of 2 * kStep neighbours, the first half becomes sums of v[i], the second of v[i + kStep]: to
  // each lane that stays where it is, its partner is added.
  const VInt second = (Iota() & kStep) != 0;
  const VInt partner = (Iota() ^ kStep) + (second & kLanes);
  for (int i = 0; i < kStep; ++i) {
    v[i] = Select(second, v[i + kStep], v[i]) + __builtin_shuffle(v[i], v[i + kStep], partner);
  }
  if constexpr (kStep > 1) return AddLanes<kStep / 2>(v);
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

/*!
 * \brief exp(x) for a softmax's weights: x <= 0, or NaN, which stays NaN.
 *
 * Within 3e-7 of the largest weight, 1; small ones are as exact as their exponents are, which is
 * what a sum of weights needs.
 */
inline VFloat ExpOfWeight(VFloat x) {
#if defined(__AVX512F__)
  const VFloat y = Max(Broadcast(-150.0f), x * 1.44269504088896341f);  // -inf - -inf would be NaN
  const VFloat n = (VFloat)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT);
  const VFloat f = y - n;
  // Least largest relative error on [-1/2, 1/2] of those that are 1 at 0.
  VFloat p = Broadcast(1.32647272e-03f);
  p = p * f + 9.67151264e-03f;
  p = p * f + 5.55073374e-02f;
  p = p * f + 2.40222421e-01f;
  p = p * f + 6.93146978e-01f;
  p = p * f + 1.0f;
  return (VFloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return Exp(x);
#endif
}

/*! \brief tanh(x) within 4e-7 of it, relative: a rational function of least largest error. */
inline VFloat Tanh(VFloat x) {
  constexpr float kOne = 9.0f;  // from here on the nearest float is 1
  // In this order NaN passes through: a comparison with it is false.
  const VFloat y = Min(Broadcast(kOne), Max(Broadcast(-kOne), x));
  const VFloat y2 = y * y;
  VFloat p = Broadcast(1.33546590e-08f);
  p = p * y2 + 2.06090811e-05f;
  p = p * y2 + 3.49558807e-03f;
  p = p * y2 + 1.33810256e-01f;
  p = p * y2 + 9.99999979e-01f;
  VFloat q = Broadcast(7.77655745e-07f);
  q = q * y2 + 3.28563471e-04f;
  q = q * y2 + 2.58769820e-02f;
  q = q * y2 + 4.67143412e-01f;
  q = q * y2 + 1.0f;
  return y * p / q;
}

/*! \brief Neighbours that are multiplied together. */
struct BFloat16Pair {
  BFloat16 low, high;
};

inline VFloat LoadWords(const float* p) { return Load(p); }
inline VInt LoadWords(const BFloat16Pair* p) {
  VInt v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline VFloat BroadcastWord(float x) { return Broadcast(x); }
inline VInt BroadcastWord(BFloat16Pair x) {
  int32_t word;
  std::memcpy(&word, &x, sizeof(word));
  return Broadcast(word);
}

/*! \brief Two vectors rounded to bfloat16, as pairs. */
inline void StorePairs(BFloat16Pair* to, VFloat low, VFloat high) {
  VInt low_bits, high_bits;
  std::memcpy(&low_bits, &low, sizeof(low_bits));
  std::memcpy(&high_bits, &high, sizeof(high_bits));
  // Half up: ties away from even are as good for probabilities, and need no second addition.
  const VInt pairs = (((low_bits + 0x8000) >> 16) & 0xffff) | ((high_bits + 0x8000) & ~0xffff);
  std::memcpy(to, &pairs, sizeof(pairs));
}

inline VFloat Dot(VFloat acc, VFloat a, VFloat b) { return acc + a * b; }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
/*! Sums of two products a lane are one instruction. */
#define TVM_FLASHINFER_BF16_DOT 1
inline constexpr bool kBf16Dot = true;

inline VInt LoadPairs(const BFloat16* p) { return (VInt)_mm512_loadu_si512(p); }

/*! \brief acc[i] += a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], of bfloat16 elements. */
inline VFloat Dot(VFloat acc, VInt a, VInt b) {
  return (VFloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}

/*! \brief Four neighbours of `a` and of `b` in turn, from each eight: the first four, the last. */
inline VInt InterleaveLow(VInt a, VInt b) {
  return (VInt)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
}
inline VInt InterleaveHigh(VInt a, VInt b) {
  return (VInt)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}

/*! \brief To nearest, ties to even. */
inline void StoreRounded(BFloat16* p, VFloat v) {
  const auto rounded = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &rounded, sizeof(rounded));
}
#else
inline constexpr bool kBf16Dot = false;
#endif

/*! \brief Where the pair with element i of `a` is: its lane, that of InterleaveHigh + kLanes. */
inline int InterleavedAt(int i) { return i / 8 * 4 + i % 4 + (i % 8 < 4 ? 0 : kLanes); }

// Into L2: a core has too few L1 fill buffers for prefetches and the loads of this block at once.
inline void Prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_SIMD_H_
