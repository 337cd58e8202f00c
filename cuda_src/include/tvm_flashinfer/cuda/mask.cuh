// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Applies a variant to a tile of logits. Whole tiles are classified first: empty ones are neither
// loaded nor computed, full ones see no mask.
#ifndef TVM_FLASHINFER_CUDA_MASK_CUH_
#define TVM_FLASHINFER_CUDA_MASK_CUH_

#include "../variant.h"
#include "block_layout.cuh"
#include "lanes.cuh"
#include "launch_params.cuh"
#include "pipeline.cuh"
#include "q_tile.cuh"
#include "query_row.cuh"

namespace tvm_flashinfer {
namespace cuda {

template <typename C, typename Variant>
class ItemMask {
 public:
  using VariantParams = typename Variant::Params;

  __device__ __forceinline__ ItemMask(const LaunchParams& p, const VariantParams& variant,
                                      const ItemInfo& info, const QTile<C>& q,
                                      const BlockLayout<C>& at)
      : variant_(variant), info_(info), slice_(at.slice), column_(2 * (at.lane % 4)) {
    if constexpr (Variant::kHasMask || Variant::kHasLogits) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Rows past the tile repeat its last one: their state is never written.
        const int row = min(at.Row(h), q.rows - 1);
        const int token = q.q_begin + q.Token(row);
        request_[h] = p.plan.q_request[token];
        q_idx_[h] = p.plan.q_position[token];
        q_head_[h] = q.Head(row);
      }
    }
  }

  /*! \param rows The two rows of this thread. */
  __device__ __forceinline__ ItemMask(const VariantParams& variant, const ItemInfo& info,
                                      const QueryRow (&rows)[2], const BlockLayout<C>& at)
      : variant_(variant), info_(info), slice_(at.slice), column_(2 * (at.lane % 4)) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      request_[h] = rows[h].request;
      q_idx_[h] = rows[h].position;
      q_head_[h] = rows[h].head;
    }
  }

  /*! \brief What happens to all tokens of a step: empty ones are not in the ring. */
  __device__ __forceinline__ TileClass ClassifyStep(int step) const {
    return ClassifyTokens<Variant>(variant_, info_, step * C::kStepKV, C::kStepKV);
  }

  /*! \brief What happens to this warp's slice of a step. */
  __device__ __forceinline__ TileClass ClassifySlice(int step) const {
    return ClassifyTokens<Variant>(variant_, info_, FirstToken(step), C::kSliceKV);
  }

  /*!
   * \brief Logits transform; `s` holds q.k and leaves as final logits, in units of log2 if they go
   * through a softmax.
   */
  template <int kTiles>
  __device__ __forceinline__ void Transform(float (&s)[kTiles][4], int step, float sm_scale) const {
    ForEach(s, step, [&](float& x, const ElementIndex<int32_t>& at) {
      constexpr float kUnit = Variant::kSoftmax ? kLog2e : 1.0f;
      x = Variant::template Logits<ThreadLanes>(variant_, x * sm_scale, at) * kUnit;
    });
  }

  /*! \brief Send hidden elements, and those past the chunk's end, to what weighs nothing. */
  template <int kTiles>
  __device__ __forceinline__ void Mask(float (&s)[kTiles][4], int step) const {
    const int32_t end = info_.kv_position + info_.item.kv_count;
    ForEach(s, step, [&](float& x, const ElementIndex<int32_t>& at) {
      bool visible = at.kv_idx < end;
      if constexpr (Variant::kHasMask) {
        visible = visible && Variant::template Mask<ThreadLanes>(variant_, at);
      }
      x = visible ? x : Variant::kSoftmax ? TVM_FLASHINFER_NEG_INF : 0.0f;
    });
  }

 private:
  __device__ __forceinline__ int FirstToken(int step) const {
    return step * C::kStepKV + slice_ * C::kSliceKV;
  }

  template <int kTiles, typename F>
  __device__ __forceinline__ void ForEach(float (&s)[kTiles][4], int step, F f) const {
    const int32_t first = info_.kv_position + FirstToken(step) + column_;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        ElementIndex<int32_t> at{0, 0, first + n * 8 + e % 2, 0, info_.item.head};
        if constexpr (Variant::kHasMask || Variant::kHasLogits) {
          at.request = request_[e / 2];
          at.q_idx = q_idx_[e / 2];
          at.q_head = q_head_[e / 2];
        }
        f(s[n][e], at);
      }
    }
  }

  const VariantParams& variant_;
  const ItemInfo& info_;
  int slice_, column_;
  int32_t request_[2], q_idx_[2], q_head_[2];
};

/*!
 * \brief How products of queries and keys become logits: through the variant, or by a scale that
 * may have any sign, while maxima are of logits under a positive one.
 */
template <typename Variant>
struct LogitScale {
  float sm_scale;
  float factor;    //!< of products, where the variant does not take them
  float exponent;  //!< from there to units of log2

  __device__ __forceinline__ explicit LogitScale(float scale) : sm_scale(scale) {
    if constexpr (Variant::kHasLogits) {
      factor = exponent = 1.0f;
    } else if constexpr (!Variant::kSoftmax) {
      factor = scale;
      exponent = 1.0f;
    } else {
      factor = scale < 0.0f ? -1.0f : scale == 0.0f ? 0.0f : 1.0f;
      exponent = scale == 0.0f ? 1.0f : fabsf(scale * kLog2e);
    }
  }

  template <typename C, int kTiles>
  __device__ __forceinline__ void Apply(float (&s)[kTiles][4], const ItemMask<C, Variant>& mask,
                                        int step) const {
    if constexpr (Variant::kHasLogits) {
      mask.Transform(s, step, sm_scale);
    } else if (factor != 1.0f) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= factor;
      }
    }
  }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_MASK_CUH_
