// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The kernel of linear_stream.h. It is compiled once per instruction set into one library, so that
// the library runs on any CPU of its architecture: all of it sits in an unnamed namespace, or the
// linker would keep one compilation of each inline function for all of them. For the same reason it
// calls no inline function of another header.
#ifndef TVM_FLASHINFER_RUNTIME_LINEAR_STREAM_KERNEL_H_
#define TVM_FLASHINFER_RUNTIME_LINEAR_STREAM_KERNEL_H_

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <tvm_flashinfer/dtype.h>

#include "linear_stream.h"

namespace tvm_flashinfer {
namespace linear {
namespace {

#define TVM_FLASHINFER_INLINE inline __attribute__((always_inline))
#define TVM_FLASHINFER_INLINE_LAMBDA __attribute__((always_inline))

// A tile's sums, its weights and one vector of x fit into the registers: 32, or else 16.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxTileRows = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kMaxTileRows = 4;
#else
constexpr int kLanes = 4;
constexpr int kMaxTileRows = 4;
#endif

// Of x, kMaxTileRows times kBlock floats (16 or 32 KiB) stay in the first-level cache while weight
// lines stream past them; of the weight, kLineGroup times kBlock elements (192 KiB) stay in the
// second-level cache while the tiles of x take turns at them.
constexpr int64_t kBlock = 1024;
constexpr int64_t kLineGroup = 48;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));

TVM_FLASHINFER_INLINE Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

TVM_FLASHINFER_INLINE Vec Load(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Vec)((VecBits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return (Vec)((VecBits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (Vec)(__builtin_convertvector(bits, VecBits) << 16);
#endif
}

TVM_FLASHINFER_INLINE Vec Load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Exponent and mantissa into place; the product rebases the exponent, of subnormals too.
  HalfBits half;
  std::memcpy(&half, p, sizeof(half));
  const VecBits bits = __builtin_convertvector(half, VecBits);
  const VecBits magnitude = (bits & 0x7fff) << 13;
  const VecBits finite = (VecBits)((Vec)magnitude * 0x1p112f);
  const VecBits special = magnitude + ((255u - 31u) << 23);  // inf, nan
  const VecBits is_special = (VecBits)(magnitude >= (0x7c00u << 13));
  return (Vec)((is_special & special) | (~is_special & finite) | ((bits & 0x8000) << 16));
#endif
}

/*! \brief The last, incomplete vector of a line; lanes beyond the line are zero. */
template <typename W>
TVM_FLASHINFER_INLINE Vec LoadTail(const W* p, int64_t count) {
  W padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(W));
  return Load(padded);
}

TVM_FLASHINFER_INLINE float Sum(Vec v) {
#if defined(__AVX512F__)
  typedef float Half __attribute__((vector_size(32)));
  const Half half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const Vec half = v;
#endif
  typedef float Quarter __attribute__((vector_size(16)));
#if defined(__AVX__)
  const Quarter quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) +
                          __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
  const Quarter quarter = half;
#endif
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

inline void SetZero(const StreamArgs& a) {
  for (int64_t i = 0; i < a.m; ++i) {
    for (int64_t n = 0; n < a.n; ++n) a.y[i * a.y_stride + n] = 0.0f;
  }
}

/*! \brief Some lines of the weight, columns k0 to k0 + count, in one of several passes. */
template <typename W>
struct Block {
  const W* weight;  // line 0, column k0
  const W* next;    // the same of the block that comes next: each pass fetches a share of it
  int64_t k0, count, lines;
  int64_t pass, passes;
};

/*!
 * \brief y[i, r * S] (+)= x[i, :] . weight[r * S, :] over a block's columns; M rows, R lines.
 *
 * A pair (i, r) has one vector of partial sums for each kBlock columns, whatever M and R are.
 */
template <int M, int R, typename W>
TVM_FLASHINFER_INLINE void DotTile(const StreamArgs& a, const Block<W>& block, int64_t line,
                                   int64_t line_stride, const float* x, float* y) {
  constexpr int64_t kCacheLine = 64 / sizeof(W);
  const int64_t stride = line_stride * a.weight_ld;
  const W* weight = block.weight + line * a.weight_ld;
  // Of the lines that this pass fetches, the passes-th part of one: memory is walked in order.
  const W* fetch = block.next + block.count / block.passes * (line % block.passes) +
                   (line_stride * block.pass / block.passes + line / block.passes) * a.weight_ld;
  y += line;
  int64_t until_fetch = 1;
  int64_t k = 0;
  while (k < block.count) {
    const int64_t begin = k;
    const int64_t end = block.count - k < kBlock ? block.count : k + kBlock;
    Vec sum[R][M] = {};
    const auto multiply_add = [&]() TVM_FLASHINFER_INLINE_LAMBDA {
      Vec w[R];
      for (int r = 0; r < R; ++r) w[r] = Load(weight + r * stride + k);
      for (int i = 0; i < M; ++i) {
        const Vec v = Load(x + i * a.x_stride + k);
        for (int r = 0; r < R; ++r) sum[r][i] += v * w[r];
      }
    };
    while (k + kCacheLine <= end) {
      if (--until_fetch == 0) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(fetch + r * stride, 0, 2);
        fetch += kCacheLine;
        until_fetch = block.passes;
      }
      for (int64_t j = 0; j < kCacheLine; j += kLanes, k += kLanes) multiply_add();
    }
    for (; k + kLanes <= end; k += kLanes) multiply_add();
    if (k < end) {
      for (int r = 0; r < R; ++r) {
        const Vec w = LoadTail(weight + r * stride + k, end - k);
        for (int i = 0; i < M; ++i) sum[r][i] += Load(x + i * a.x_stride + k) * w;
      }
      k = end;
    }
    const bool first = block.k0 + begin == 0;
    for (int i = 0; i < M; ++i) {
      for (int r = 0; r < R; ++r) {
        float* out = y + i * a.y_stride + r * line_stride;
        const float s = Sum(sum[r][i]);
        *out = first ? s : *out + s;
      }
    }
  }
}

/*!
 * \brief M rows of x times all lines of a block.
 *
 * The R lines of a tile are far apart, so that each walks through memory of its own without a gap:
 * with neighbouring lines the streams would jump every few hundred bytes, which costs a third of
 * the bandwidth when a line is shorter than a page.
 */
template <int M, typename W>
TVM_FLASHINFER_INLINE void DotLines(const StreamArgs& a, const Block<W>& block, const float* x,
                                    float* y) {
  constexpr int R = M < 3 ? 4 : 3;
  const int64_t apart = block.lines / R;
  for (int64_t n = 0; n < apart; ++n) DotTile<M, R>(a, block, n, apart, x, y);
  for (int64_t n = apart * R; n < block.lines; ++n) DotTile<M, 1>(a, block, n, 1, x, y);
}

template <int M, typename W>
TVM_FLASHINFER_INLINE void DotRows(const StreamArgs& a, const Block<W>& block, int64_t rows,
                                   const float* x, float* y) {
  if constexpr (M == 1) {
    DotLines<1>(a, block, x, y);
  } else if (rows == M) {
    DotLines<M>(a, block, x, y);
  } else {
    DotRows<M - 1>(a, block, rows, x, y);
  }
}

template <typename W>
void StreamNK(const StreamArgs& a) {
  const W* weight = static_cast<const W*>(a.weight);
  const int64_t tiles = (a.m + kMaxTileRows - 1) / kMaxTileRows;
  if (a.k == 0) return SetZero(a);
  if (tiles == 1) {
    // Each line is needed once: no blocks, and fetch a little ahead on the same way.
    constexpr int64_t kAhead = 512 / sizeof(W);
    return DotRows<kMaxTileRows>(a, Block<W>{weight, weight + kAhead, 0, a.k, a.n, 0, 1}, a.m, a.x,
                                 a.y);
  }
  for (int64_t n0 = 0; n0 < a.n; n0 += kLineGroup) {
    const W* lines = weight + n0 * a.weight_ld;
    for (int64_t k0 = 0; k0 < a.k; k0 += kBlock) {
      Block<W> block;
      block.weight = lines + k0;
      block.next = k0 + kBlock < a.k ? lines + k0 + kBlock : lines + kLineGroup * a.weight_ld;
      block.k0 = k0;
      block.count = a.k - k0 < kBlock ? a.k - k0 : kBlock;
      block.lines = a.n - n0 < kLineGroup ? a.n - n0 : kLineGroup;
      block.passes = tiles;
      for (block.pass = 0; block.pass < tiles; ++block.pass) {
        const int64_t row = a.m * block.pass / tiles;  // all tiles equal, or one row less
        DotRows<kMaxTileRows>(a, block, a.m * (block.pass + 1) / tiles - row,
                              a.x + row * a.x_stride + k0, a.y + row * a.y_stride + n0);
      }
    }
  }
}

/*! \brief y[0 .. count] += sum_r x[r] * weight[r, 0 .. count] for R lines of a [K, N] weight. */
template <int R, typename W>
TVM_FLASHINFER_INLINE void AddLines(const float* x, const W* weight, int64_t ld, float* y,
                                    int64_t count) {
  Vec factor[R];
  for (int r = 0; r < R; ++r) factor[r] = Vec{} + x[r];
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    Vec sum = Load(y + n);
    for (int r = 0; r < R; ++r) sum += factor[r] * Load(weight + r * ld + n);
    std::memcpy(y + n, &sum, sizeof(sum));
  }
  if (n < count) {
    Vec sum = LoadTail(y + n, count - n);
    for (int r = 0; r < R; ++r) sum += factor[r] * LoadTail(weight + r * ld + n, count - n);
    std::memcpy(y + n, &sum, static_cast<size_t>(count - n) * sizeof(float));
  }
}

template <typename W>
void StreamKN(const StreamArgs& a) {
  constexpr int64_t kColumns =
      512;  // times kDepth lines: stay in the first-level cache for all rows
  constexpr int64_t kDepth = 8;
  SetZero(a);
  for (int64_t n = 0; n < a.n; n += kColumns) {
    const int64_t count = a.n - n < kColumns ? a.n - n : kColumns;
    const W* weight = static_cast<const W*>(a.weight) + n;
    int64_t k = 0;
    for (; k + kDepth <= a.k; k += kDepth) {
      for (int64_t i = 0; i < a.m; ++i) {
        AddLines<kDepth>(a.x + i * a.x_stride + k, weight + k * a.weight_ld, a.weight_ld,
                         a.y + i * a.y_stride + n, count);
      }
    }
    for (; k < a.k; ++k) {
      for (int64_t i = 0; i < a.m; ++i) {
        AddLines<1>(a.x + i * a.x_stride + k, weight + k * a.weight_ld, a.weight_ld,
                    a.y + i * a.y_stride + n, count);
      }
    }
  }
}

template <typename W>
void Stream(const StreamArgs& args) {
  return args.layout == WeightLayout::kNK ? StreamNK<W>(args) : StreamKN<W>(args);
}

template <typename W>
void WidenFrom(const W* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec v = Load(from + i);
    std::memcpy(to + i, &v, sizeof(v));
  }
  if (i < count) {
    const Vec v = LoadTail(from + i, count - i);
    std::memcpy(to + i, &v, static_cast<size_t>(count - i) * sizeof(float));
  }
}

TVM_FLASHINFER_INLINE HalfBits ToBFloat16(Vec v) {
  const VecBits bits = (VecBits)v;
  const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const VecBits nan = (bits >> 16) | 0x40;
  const VecBits is_nan = (VecBits)((bits & 0x7fffffff) > 0x7f800000u);
  return __builtin_convertvector((is_nan & nan) | (~is_nan & rounded), HalfBits);
}

TVM_FLASHINFER_INLINE HalfBits ToFloat16(Vec v) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  // To nearest even. A normal result: round at bit 13 and rebase the exponent. A subnormal one:
  // adding 0.5, whose last place is the subnormal step, leaves the rounded result in the low bits.
  const VecBits bits = (VecBits)v & 0x7fffffff;
  const VecBits sign = ((VecBits)v >> 16) & 0x8000;
  const VecBits normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const VecBits subnormal = (VecBits)((Vec)bits + 0.5f) - 0x3f000000;
  const VecBits is_small = (VecBits)(bits < 0x38800000u);
  const VecBits is_large = (VecBits)(bits >= 0x47800000u);  // 65536 and above, inf, nan
  const VecBits is_nan = (VecBits)(bits > 0x7f800000u);
  const VecBits large = (is_nan & 0x7e00) | (~is_nan & 0x7c00);
  const VecBits finite = (is_small & subnormal) | (~is_small & normal);
  return __builtin_convertvector(sign | (is_large & large) | (~is_large & finite), HalfBits);
#endif
}

template <HalfBits (*Convert)(Vec)>
void NarrowTo(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const HalfBits bits = Convert(Load(from + i));
    std::memcpy(to + i, &bits, sizeof(bits));
  }
  if (i < count) {
    const HalfBits bits = Convert(LoadTail(from + i, count - i));
    std::memcpy(to + i, &bits, static_cast<size_t>(count - i) * sizeof(uint16_t));
  }
}

void StreamAny(const StreamArgs& args) {
  switch (args.storage) {
    case Storage::kFloat32:
      return Stream<float>(args);
    case Storage::kFloat16:
      return Stream<Float16>(args);
    case Storage::kBFloat16:
      return Stream<BFloat16>(args);
  }
}

void WidenAny(const void* from, Storage storage, float* to, int64_t count) {
  switch (storage) {
    case Storage::kFloat32:
      return WidenFrom(static_cast<const float*>(from), to, count);
    case Storage::kFloat16:
      return WidenFrom(static_cast<const Float16*>(from), to, count);
    case Storage::kBFloat16:
      return WidenFrom(static_cast<const BFloat16*>(from), to, count);
  }
}

void NarrowAny(const float* from, void* to, Storage storage, int64_t count) {
  switch (storage) {
    case Storage::kFloat32:
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
      return;
    case Storage::kFloat16:
      return NarrowTo<ToFloat16>(from, static_cast<uint16_t*>(to), count);
    case Storage::kBFloat16:
      return NarrowTo<ToBFloat16>(from, static_cast<uint16_t*>(to), count);
  }
}

}  // namespace
}  // namespace linear
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_LINEAR_STREAM_KERNEL_H_
