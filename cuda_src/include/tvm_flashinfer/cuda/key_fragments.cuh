// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Keys that a variant transforms in registers, on their way into a fragment: rotary embedding of
// keys that are cached as they came, say. A lane of Q K^T has two tokens' dims 2 q, 2 q + 1, 2 q +
// 8 and 2 q + 9 of every 16, so that an element and the one it is rotated with, half a head away or
// next to it, are one lane's, and what both need (an angle) is worked out once.
#ifndef TVM_FLASHINFER_CUDA_KEY_FRAGMENTS_CUH_
#define TVM_FLASHINFER_CUDA_KEY_FRAGMENTS_CUH_

#include "../variant.h"
#include "block_layout.cuh"
#include "convert.cuh"
#include "lanes.cuh"
#include "launch_params.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief The vocabulary of variants over an element and its partner (VariantDefaults). */
struct PairLanes : ThreadLanes {
  using Uniform = ThreadLanes;
  struct Vector {
    float own, partner;
    int32_t dim;
  };
  __device__ __forceinline__ static float Element(const Vector& x) { return x.own; }
  __device__ __forceinline__ static float Element(const Vector& x, int32_t index) {
    return index == x.dim ? x.own : x.partner;
  }
};

/*! \brief What transforms the key fragments of 16 tokens of an item. */
template <typename C, typename Variant>
class KeyTransform {
 public:
  //! Fragments of 16 dims between an element and its partner; 0: both are in one.
  static constexpr int kAway = Variant::kKeyPartner / 16;

  /*! \param token The first one, in the item's chunk. */
  __device__ __forceinline__ KeyTransform(const LaunchParams& p,
                                          const typename Variant::Params& variant,
                                          const ItemInfo& info, const BlockLayout<C>& at, int token)
      : variant_(variant), head_(info.item.head), first_dim_((at.lane & 3) * 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Parameters cover no positions past the end; what is made of those tokens is masked.
      const int own = min(token + half * 8 + at.lane / 4, info.item.kv_count - 1);
      position_[half] = info.kv_position + own;
      row_[half] = PoolRow(p, info.item, own);
    }
  }

  /*! \brief Dims [16 k, 16 k + 16), which read no others. */
  __device__ __forceinline__ void Apply(uint32_t (&b)[4], int k) const {
    float x[4][2];
    Unpack(b, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float y[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float partner = Variant::kKeyPartner == 1   ? x[i][j ^ 1]
                              : Variant::kKeyPartner == 8 ? x[i ^ 1][j]
                                                          : x[i][j];
        y[j] = Element(x[i][j], partner, i, j, k);
      }
      b[i] = ptx::Pack2<T>(y[0], y[1]);
    }
  }

  /*! \brief Dims [16 k, 16 k + 16) and those kAway fragments on, which read each other. */
  __device__ __forceinline__ void Apply(uint32_t (&b)[4], uint32_t (&c)[4], int k) const {
    float x[4][2], y[4][2];
    Unpack(b, x);
    Unpack(c, y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float first[2], second[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        first[j] = Element(x[i][j], y[i][j], i, j, k);
        second[j] = Element(y[i][j], x[i][j], i, j, k + kAway);
      }
      b[i] = ptx::Pack2<T>(first[0], first[1]);
      c[i] = ptx::Pack2<T>(second[0], second[1]);
    }
  }

 private:
  using T = typename C::T;

  __device__ __forceinline__ static void Unpack(const uint32_t (&b)[4], float (&x)[4][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i][0] = ptx::ToFloat(T{static_cast<uint16_t>(b[i])});
      x[i][1] = ptx::ToFloat(T{static_cast<uint16_t>(b[i] >> 16)});
    }
  }

  /*! \brief The element `j` of register `i` (ptx::LdMatrixX4 as MultiplyQK loads keys). */
  __device__ __forceinline__ float Element(float own, float partner, int i, int j, int k) const {
    const int dim = 16 * k + i % 2 * 8 + first_dim_ + j;
    const VectorIndex<PairLanes> at{0, position_[i / 2], 0, head_, row_[i / 2], dim};
    return Variant::template Key<PairLanes>(variant_, PairLanes::Vector{own, partner, dim}, at);
  }

  const typename Variant::Params& variant_;
  int32_t head_, first_dim_;
  int32_t position_[2], row_[2];
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KEY_FRAGMENTS_CUH_
