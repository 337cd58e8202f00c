// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The vocabulary of variants (variant.h) over SIMD vectors.
#ifndef TVM_FLASHINFER_CPU_SIMD_LANES_H_
#define TVM_FLASHINFER_CPU_SIMD_LANES_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../scalar_lanes.h"
#include "simd.h"

namespace tvm_flashinfer {
namespace cpu {

/*! Apply a scalar function lane by lane, where none is vectorised. */
template <typename Fn>
inline VFloat Map(VFloat x, const Fn& fn) {
  VFloat y;
  for (int i = 0; i < kLanes; ++i) y[i] = fn(x[i]);
  return y;
}

inline bool AllZero(VInt v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) == 0;
#elif defined(__AVX__)
  return _mm256_testz_si256((__m256i)v, (__m256i)v) != 0;
#else
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= v[i];
  return any == 0;
#endif
}

/*! Whether index[i] is index[0] + i. */
inline bool AreNeighbours(VInt index) { return AllZero((index - Iota()) ^ Broadcast(index[0])); }

/*! v[i] = data[index[i]] */
inline VFloat Gather(const float* data, VInt index) {
#if defined(__AVX512F__)
  return (VFloat)_mm512_i32gather_ps((__m512i)index, data, 4);
#elif defined(__AVX2__)
  return (VFloat)_mm256_i32gather_ps(data, (__m256i)index, 4);
#else
  VFloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = data[index[i]];
  return v;
#endif
}

inline VInt Gather(const int32_t* data, VInt index) {
#if defined(__AVX512F__)
  return (VInt)_mm512_i32gather_epi32((__m512i)index, data, 4);
#elif defined(__AVX2__)
  return (VInt)_mm256_i32gather_epi32(data, (__m256i)index, 4);
#else
  VInt v;
  for (int i = 0; i < kLanes; ++i) v[i] = data[index[i]];
  return v;
#endif
}

/*!
 * \brief sin(x + quarters * pi / 2), within 2 ulp of 1 for |x| up to 8192.
 *
 * Cephes' sinf and cosf: the nearest multiple of pi / 2 is taken off in three parts, the rest goes
 * into the polynomial of the quarter it falls in.
 */
inline VFloat SinQuarters(VFloat x, int quarters) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const VFloat shifted = x * 0.636619772367581343f + kRound;
  const VFloat n = shifted - kRound;
  VFloat r = x - n * 1.5703125f;
  r = r - n * 4.83751296997e-4f;
  r = r - n * 7.54978995489e-8f;
  VInt bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const VInt quarter = bits + quarters;
  const VFloat r2 = r * r;
  VFloat s = Broadcast(-1.9515295891e-4f);
  s = s * r2 + 8.3321608736e-3f;
  s = s * r2 - 1.6666654611e-1f;
  s = s * r2 * r + r;
  VFloat c = Broadcast(2.443315711809948e-5f);
  c = c * r2 - 1.388731625493765e-3f;
  c = c * r2 + 4.166664568298827e-2f;
  c = c * r2 * r2 - 0.5f * r2 + 1.0f;
  const VFloat y = Select((quarter & 1) != 0, c, s);
  return Select((quarter & 2) != 0, -y, y);
}

struct SimdLanes {
  using Float = VFloat;
  using Int = VInt;
  using UInt = VUInt;
  using Mask = VInt;
  using Uniform = ScalarLanes;
  /*! A head vector as float32, and the first of the elements that are computed. */
  struct Vector {
    const float* data;  //!< zeros follow its last element up to whole vectors
    int32_t last;
    int32_t dim;
  };

  static Float F(float x) { return Broadcast(x); }
  static Int I(int32_t x) { return Broadcast(x); }
  static Mask B(bool x) { return Broadcast(x ? -1 : 0); }
  static Float Splat(float x) { return Broadcast(x); }
  static Int Splat(int32_t x) { return Broadcast(x); }
  static UInt Splat(uint32_t x) { return UInt{} + x; }
  static Mask Splat(bool x) { return B(x); }
  static Float ToFloat(Int x) { return __builtin_convertvector(x, VFloat); }
  static Int ToInt(Float x) { return __builtin_convertvector(x, VInt); }
  static Int ToInt(UInt x) { return (Int)x; }
  static UInt ToUInt(Int x) { return (UInt)x; }
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
  static Int ShiftRight(Int a, Int bits) { return a >> bits; }
  static Int ShiftLeft(Int a, Int bits) { return a << bits; }
  static Int BitAnd(Int a, Int b) { return a & b; }
  static Int BitOr(Int a, Int b) { return a | b; }
  static Int BitXor(Int a, Int b) { return a ^ b; }

  static Float Element(const Vector& x) { return Load(x.data + x.dim); }
  /*! Neighbours and permutations within a vector, the usual cases, need no gather. */
  static Float Element(const Vector& x, Int index) {
    index = Max(Int{}, Min(index, Broadcast(x.last)));
    if (AreNeighbours(index)) return Load(x.data + index[0]);
    const Int lane = index - x.dim;
    if (AllZero(lane & ~(kLanes - 1))) return __builtin_shuffle(Element(x), lane);
    return Gather(x.data, index);
  }

  /*! Neighbours, the usual case, need no gather. */
  static Float LoadFloat(const VariantArg& arg, Int index) {
    const auto* data = static_cast<const float*>(arg.data);
    if (AreNeighbours(index)) return Load(data + index[0]);
    return Gather(data, index);
  }
  static Int LoadInt(const VariantArg& arg, Int index) {
    return Gather(static_cast<const int32_t*>(arg.data), index);
  }
#define TVM_FLASHINFER_LOAD_LANES(fn, Type)                                 \
  static Type fn(const VariantArg& arg, Int index) {                        \
    Type v;                                                                 \
    for (int i = 0; i < kLanes; ++i) v[i] = ScalarLanes::fn(arg, index[i]); \
    return v;                                                               \
  }
  TVM_FLASHINFER_LOAD_LANES(LoadFloat16, Float)
  TVM_FLASHINFER_LOAD_LANES(LoadBFloat16, Float)
  TVM_FLASHINFER_LOAD_LANES(LoadInt8, Int)
  TVM_FLASHINFER_LOAD_LANES(LoadUInt8, Int)
#undef TVM_FLASHINFER_LOAD_LANES
  static Mask LoadBool(const VariantArg& arg, Int index) { return LoadUInt8(arg, index) != 0; }

  static Float Exp(Float x) { return cpu::Exp(x); }
  static Float Exp2(Float x) { return cpu::Exp(x * 0.693147181f); }
  static Float Tanh(Float x) { return cpu::Tanh(x); }
  static Float Sigmoid(Float x) {
    const Float e = cpu::Exp(cpu::Min(x, -x)), s = 1.0f / (1.0f + e);
    return Select(x < 0.0f, e * s, s);
  }
  static Float Abs(Float x) { return cpu::Max(x, -x); }
  static Float Sin(Float x) { return SinQuarters(x, 0); }
  static Float Cos(Float x) { return SinQuarters(x, 1); }
  /*! Of angles in [-pi, pi]. */
  static Float SinWithinTurn(Float x) { return Sin(x); }
  static Float CosWithinTurn(Float x) { return Cos(x); }
  static Float Sqrt(Float x) {
    return Map(x, [](float e) { return std::sqrt(e); });
  }
  static Float Log(Float x) {
    return Map(x, [](float e) { return std::log(e); });
  }
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_SIMD_LANES_H_
