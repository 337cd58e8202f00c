// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Matrix products on Intel AMX tiles: bfloat16 operands, float32 sums.
//
// A tile holds 16 rows of 64 bytes. TDPBF16PS adds A B to C, where A is 16 rows of 32 elements, B
// is 32 rows of 16 columns stored in pairs of rows ("VNNI": 16 rows of 16 pairs), and C is 16 x 16
// floats. Both products of attention are laid out so that packed query rows are the columns of C,
// as in many_rows.h: S = K Q and O = V^T P. K is an A tile as it lies in the pool, Q is paired up
// once per item, V is transposed once per block and serves all rows, and P pairs up in registers.
#ifndef TVM_FLASHINFER_CPU_AMX_H_
#define TVM_FLASHINFER_CPU_AMX_H_

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define TVM_FLASHINFER_AMX 1

#include <asm/prctl.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "simd.h"

namespace tvm_flashinfer {
namespace cpu {
namespace amx {

inline constexpr int kRows = 16;       // of a tile
inline constexpr int kDepth = 32;      // elements of a row of A, rows of B
inline constexpr int kTileBytes = 64;  // of a row

/*! \brief Whether this process may use the tiles; asks Linux once, which grants them lazily. */
inline bool Available() {
  static const bool granted = [] {
    constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, missing in older headers
    constexpr int kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

/*! \brief Tiles of this thread are whole (16 rows of 64 bytes) while one lives. */
class TileScope {
 public:
  TileScope() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.bytes_per_row[i] = kTileBytes;
      config.rows[i] = kRows;
    }
    // The intrinsic doesn't tell the compiler that it reads what the pointer points to.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

/*!
 * \brief C[32][32] (+)= A[32][depth] B[depth][32] for 2 x 2 tiles.
 *
 * \param a Rows of A, `a_stride` elements apart; \param b pairs of rows, [depth / 2][32][2].
 * \param c Rows of C, `c_stride` floats apart; added to if `kAccumulate`, else written.
 * \param depth A multiple of kDepth.
 */
template <bool kAccumulate>
inline void Multiply32x32(const BFloat16* a, int64_t a_stride, const BFloat16* b, float* c,
                          int64_t c_stride, int depth) {
  const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
  constexpr int kPairBytes = 2 * kTileBytes;  // of one row of pairs
  if constexpr (kAccumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kRows, c_bytes);
    _tile_loadd(2, c + kRows * c_stride, c_bytes);
    _tile_loadd(3, c + kRows * c_stride + kRows, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int d = 0; d < depth; d += kDepth) {
    const BFloat16* pairs = b + int64_t{d} * 2 * kRows;
    _tile_loadd(4, a + d, a_bytes);
    _tile_loadd(5, a + kRows * a_stride + d, a_bytes);
    _tile_loadd(6, pairs, kPairBytes);
    _tile_loadd(7, pairs + 2 * kRows, kPairBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kRows, c_bytes);
  _tile_stored(2, c + kRows * c_stride, c_bytes);
  _tile_stored(3, c + kRows * c_stride + kRows, c_bytes);
}

/*! \brief A 16 x 16 matrix of 32-bit words, transposed in registers. */
inline void Transpose16x16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 16; j += 8) {
      t[j + i] = _mm512_shuffle_i32x4(r[j + i], r[j + i + 4], 0x88);
      t[j + i + 4] = _mm512_shuffle_i32x4(r[j + i], r[j + i + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

/*!
 * \brief to[d][n] = rows[n][d] for 32 rows and 32 elements of each.
 * \param stride Elements between rows of `to`.
 */
inline void Transpose32x32(const BFloat16* const* rows, BFloat16* to, int64_t stride) {
  const auto load = [&](int n) { return _mm512_loadu_si512(rows[n]); };
  alignas(64) static constexpr auto kInterleave = [] {
    struct {
      uint16_t low[32], high[32];
    } index{};
    for (int i = 0; i < 16; ++i) {
      index.low[2 * i] = static_cast<uint16_t>(i);
      index.low[2 * i + 1] = static_cast<uint16_t>(32 + i);
      index.high[2 * i] = static_cast<uint16_t>(16 + i);
      index.high[2 * i + 1] = static_cast<uint16_t>(48 + i);
    }
    return index;
  }();
  const __m512i low = _mm512_load_si512(kInterleave.low);
  const __m512i high = _mm512_load_si512(kInterleave.high);
  __m512i words[2][16];  // [half of the elements][pair of rows]
  for (int pair = 0; pair < 16; ++pair) {
    const __m512i even = load(2 * pair), odd = load(2 * pair + 1);
    words[0][pair] = _mm512_permutex2var_epi16(even, low, odd);
    words[1][pair] = _mm512_permutex2var_epi16(even, high, odd);
  }
  for (int half = 0; half < 2; ++half) {
    Transpose16x16(words[half]);
    for (int i = 0; i < 16; ++i) {
      _mm512_storeu_si512(to + (half * 16 + i) * stride, words[half][i]);
    }
  }
}

/*! \brief 2^x for x up to 127, within 3e-6 of it and 0 far below; NaN stays NaN. */
inline VFloat Exp2(VFloat x) {
  const VFloat y = Max(Broadcast(-150.0f), x);  // -inf - -inf would be NaN
  const VFloat n = (VFloat)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT);
  const VFloat f = y - n;
  // Minimax of the relative error on [-1/2, 1/2].
  VFloat p = Broadcast(9.58285294e-3f);
  p = p * f + 5.59064262e-2f;
  p = p * f + 2.40240991e-1f;
  p = p * f + 6.93124175e-1f;
  p = p * f + 1.0f;
  return (VFloat)_mm512_scalef_ps((__m512)p, (__m512)n);
}

}  // namespace amx
}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // AMX
#endif  // TVM_FLASHINFER_CPU_AMX_H_
