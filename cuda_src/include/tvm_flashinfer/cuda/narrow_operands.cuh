// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Products with keys and values that lie in shared memory as 8-bit floats, widened in registers on
// their way into a fragment. ldmatrix moves pairs of bytes as it moves 16-bit elements, so a lane
// gets four bytes that follow each other along a row. What that permutes, the head dimension of
// Q K^T and the columns of P V, is permuted in the queries and in the output as well.
#ifndef TVM_FLASHINFER_CUDA_NARROW_OPERANDS_CUH_
#define TVM_FLASHINFER_CUDA_NARROW_OPERANDS_CUH_

#include <type_traits>

#include "block_layout.cuh"
#include "element.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Four 8-bit floats as two pairs of operands. */
template <typename C>
__device__ __forceinline__ void Widen(uint32_t packed, uint32_t (&pairs)[2]) {
  if constexpr (std::is_same_v<typename C::Product, Float16>) {
    ptx::WidenToHalf4<typename C::Pool>(packed, pairs);
  } else {
    float x[4];
    ptx::ToFloat4<typename C::Pool>(packed, x);
    pairs[0] = ptx::Pack2<typename C::Product>(x[0], x[1]);
    pairs[1] = ptx::Pack2<typename C::Product>(x[2], x[3]);
  }
}

/*!
 * \brief A warp's queries of dims [16 k, 16 k + 16): lane quad q has dims 4 q to 4 q + 3, which
 * take the places of 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 in the product.
 * \param tile The query tile.
 */
template <typename C>
__device__ __forceinline__ void NarrowQFragment(uint32_t (&a)[4], const BlockLayout<C>& at,
                                                const uint8_t* tile, int k) {
  struct alignas(8) Quad {
    uint32_t pairs[2];
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t from = C::QTile::Offset(at.Row(h), 2 * k + at.lane % 4 / 2) + at.lane % 2 * 8;
    const Quad quad = *reinterpret_cast<const Quad*>(tile + from);
    a[h] = quad.pairs[0];
    a[2 + h] = quad.pairs[1];
  }
}

/*!
 * \brief A warp's queries as operands of products (TileConfig::Product). Rows that half precision
 * does not reach are divided by a power of two, and logits multiplied by it (`exponents`).
 */
template <typename C>
struct NarrowQueries {
  static constexpr int kSteps = C::kHeadDimQK / 16;
  uint32_t fragments[kSteps][4];
  uint32_t exponents = 0;  //!< of this thread's two rows, a byte each

  __device__ __forceinline__ void Load(const BlockLayout<C>& at, const uint8_t* tile) {
    if constexpr (std::is_same_v<typename C::T, typename C::Product>) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) NarrowQFragment<C>(fragments[k], at, tile, k);
    } else {
      float top[2];
      const float whole[2] = {1.0f, 1.0f};
      LoadRounded(at, tile, whole, top);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
      }
      if (__any_sync(0xffffffffu, fmaxf(top[0], top[1]) > kLargest)) {
        float factors[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float exponent = fminf(fmaxf(ceilf(ptx::Log2(top[h])) - 15.0f, 0.0f), 120.0f);
          exponents |= static_cast<uint32_t>(exponent) << (8 * h);
          factors[h] = ptx::Exp2(-exponent);
        }
        LoadRounded(at, tile, factors, top);
      }
    }
  }

  /*! \brief Logits of products with these queries. */
  template <int kTiles>
  __device__ __forceinline__ void Restore(float (&s)[kTiles][4]) const {
    if constexpr (!std::is_same_v<typename C::T, typename C::Product>) {
      if (!__any_sync(0xffffffffu, exponents != 0)) return;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = ptx::Exp2(static_cast<float>(exponents >> (8 * h) & 0xffu));
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          s[n][2 * h] *= factor;
          s[n][2 * h + 1] *= factor;
        }
      }
    }
  }

 private:
  static constexpr float kLargest = 65504.0f;  //!< of half precision

  /*! \param top The largest magnitude of each row, of this thread's dims and before `factors`. */
  __device__ __forceinline__ void LoadRounded(const BlockLayout<C>& at, const uint8_t* tile,
                                              const float (&factors)[2], float (&top)[2]) {
    using T = typename C::T;
    top[0] = top[1] = 0.0f;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      NarrowQFragment<C>(a, at, tile, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = ptx::ToFloat(T{static_cast<uint16_t>(a[i])});
        const float y = ptx::ToFloat(T{static_cast<uint16_t>(a[i] >> 16)});
        top[i % 2] = fmaxf(top[i % 2], fmaxf(fabsf(x), fabsf(y)));
        fragments[k][i] = ptx::Pack2<typename C::Product>(x * factors[i % 2], y * factors[i % 2]);
      }
    }
  }
};

/*! \brief s = Q K^T of one slice of a stage. */
template <typename C>
__device__ __forceinline__ void MultiplyNarrowQK(float (&s)[C::kSliceKV / 8][4],
                                                 const NarrowQueries<C>& q,
                                                 const BlockLayout<C>& at, uint32_t k_tile) {
#pragma unroll
  for (int n = 0; n < C::kSliceKV / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
  }
  const int row = at.slice * C::kSliceKV + at.lane % 8 + at.lane / 16 * 8;
  const int chunk = at.lane / 8 % 2;
#pragma unroll
  for (int k = 0; k < C::kHeadDimQK / 32; ++k) {
#pragma unroll
    for (int n = 0; n < C::kSliceKV / 16; ++n) {
      uint32_t b[4];  // tokens of the first eight, dims of both halves; then of the second eight
      ptx::LdMatrixX4(b, k_tile + C::KRing::Offset(n * 16 + row, k * 2 + chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t pairs[2];
        Widen<C>(b[i], pairs);
        ptx::MmaM16N8K16<typename C::Product>(s[2 * n + i / 2], q.fragments[2 * k + i % 2],
                                              pairs[0], pairs[1]);
      }
    }
  }
  q.Restore(s);
}

/*! \brief o += P V of one slice of a stage; columns of `o` are BlockLayout::Column. */
template <typename C>
__device__ __forceinline__ void MultiplyNarrowPV(float (&o)[C::kHeadDimVO / 8][4],
                                                 const float (&s)[C::kSliceKV / 8][4],
                                                 const BlockLayout<C>& at, uint32_t v_tile) {
  using T = typename C::Product;
  const int row = at.slice * C::kSliceKV + at.lane % 16;
  const int chunk = at.lane / 16;
#pragma unroll
  for (int k = 0; k < C::kSliceKV / 16; ++k) {
    uint32_t a[4];
    PackRowOperand<T>(a, s[2 * k], s[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < C::kHeadDimVO / 32; ++n) {
      uint32_t b[4];  // 16 dims of the first eight tokens, of the second; then the next 16 dims
      ptx::LdMatrixX4Trans(b, v_tile + C::VRing::Offset(k * 16 + row, n * 2 + chunk));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // A lane has two tokens of an even and an odd dim: two tiles of one dim each.
        uint32_t first[2], second[2];
        Widen<C>(ptx::SwapInnerBytes(b[2 * i]), first);
        Widen<C>(ptx::SwapInnerBytes(b[2 * i + 1]), second);
        ptx::MmaM16N8K16<T>(o[4 * n + 2 * i], a, first[0], second[0]);
        ptx::MmaM16N8K16<T>(o[4 * n + 2 * i + 1], a, first[1], second[1]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_NARROW_OPERANDS_CUH_
