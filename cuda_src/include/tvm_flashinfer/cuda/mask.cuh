// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Applies a variant to a tile of logits: whole tiles are classified first, so that empty ones are
// neither loaded nor computed and full ones see no mask.
#ifndef TVM_FLASHINFER_CUDA_MASK_CUH_
#define TVM_FLASHINFER_CUDA_MASK_CUH_

#include "../params.h"
#include "../variant.h"
#include "block_layout.cuh"
#include "lanes.cuh"
#include "q_tile.cuh"

namespace tvm_flashinfer {
namespace cuda {

template <typename C, typename Variant>
class ItemMask {
 public:
  using VariantParams = typename Variant::Params;

  __device__ __forceinline__ ItemMask(const AttentionParams& p, const VariantParams& variant,
                                      const WorkItem& item, const QTile<C>& q,
                                      const BlockLayout<C>& at)
      : variant_(variant),
        kv_count_(item.kv_count),
        slice_(at.slice),
        column_(2 * (at.lane % 4)),
        kv_head_(item.head),
        kv_position_(p.plan.KVPosition(item.level, item.row) + item.kv_begin),
        range_{INT32_MAX, INT32_MIN, 0, 0} {
    if constexpr (Variant::kHasMask) {
      for (int t = at.lane; t < item.q_count; t += kWarpSize) {
        const int position = p.plan.q_position[item.q_begin + t];
        range_.q_lo = min(range_.q_lo, position);
        range_.q_hi = max(range_.q_hi, position);
      }
#pragma unroll
      for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
        range_.q_lo = min(range_.q_lo, __shfl_xor_sync(0xffffffffu, range_.q_lo, delta));
        range_.q_hi = max(range_.q_hi, __shfl_xor_sync(0xffffffffu, range_.q_hi, delta));
      }
    }
    if constexpr (Variant::kHasMask || Variant::kHasLogits) {
#pragma unroll
      for (int b = 0; b < C::kRowBlocks; ++b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // Rows past the tile repeat its last one: their state is never written.
          const int row = min(at.Row(b, h), q.rows - 1);
          const int token = q.q_begin + q.Token(row);
          request_[b][h] = p.plan.q_request[token];
          q_idx_[b][h] = p.plan.q_position[token];
          q_head_[b][h] = q.Head(row);
        }
      }
    }
  }

  /*! \brief What the mask, and the chunk's end, do to this slice's tokens of a step. */
  __device__ __forceinline__ TileClass Classify(int step) const {
    const int first = FirstToken(step);
    if (first >= kv_count_) return TileClass::kEmpty;
    const int end = min(first + C::kSliceKV, kv_count_);
    TileClass tile = TileClass::kFull;
    if constexpr (Variant::kHasMask) {
      TileRange range = range_;
      range.kv_lo = kv_position_ + first;
      range.kv_hi = kv_position_ + end - 1;
      tile = Variant::Classify(variant_, range);
    }
    return tile == TileClass::kFull && end < first + C::kSliceKV ? TileClass::kMixed : tile;
  }

  /*! \brief Logits transform; `s` holds q.k and leaves as final logits in units of log2. */
  template <int kTiles>
  __device__ __forceinline__ void Transform(float (&s)[C::kRowBlocks][kTiles][4], int step,
                                            float sm_scale) const {
    ForEach(s, step, [&](float& x, const ElementIndex<int32_t>& at) {
      x = Variant::template Logits<ThreadLanes>(variant_, x * sm_scale, at) * kLog2e;
    });
  }

  /*! \brief Send hidden elements, and those past the chunk's end, to -inf. */
  template <int kTiles>
  __device__ __forceinline__ void Mask(float (&s)[C::kRowBlocks][kTiles][4], int step) const {
    const int32_t end = kv_position_ + kv_count_;
    ForEach(s, step, [&](float& x, const ElementIndex<int32_t>& at) {
      bool visible = at.kv_idx < end;
      if constexpr (Variant::kHasMask) {
        visible = visible && Variant::template Mask<ThreadLanes>(variant_, at);
      }
      x = visible ? x : TVM_FLASHINFER_NEG_INF;
    });
  }

 private:
  __device__ __forceinline__ int FirstToken(int step) const {
    return (step * C::kSlices + slice_) * C::kSliceKV;
  }

  template <int kTiles, typename F>
  __device__ __forceinline__ void ForEach(float (&s)[C::kRowBlocks][kTiles][4], int step,
                                          F f) const {
    const int32_t first = kv_position_ + FirstToken(step) + column_;
#pragma unroll
    for (int b = 0; b < C::kRowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          ElementIndex<int32_t> at{0, 0, first + n * 8 + e % 2, 0, kv_head_};
          if constexpr (Variant::kHasMask || Variant::kHasLogits) {
            at.request = request_[b][e / 2];
            at.q_idx = q_idx_[b][e / 2];
            at.q_head = q_head_[b][e / 2];
          }
          f(s[b][n][e], at);
        }
      }
    }
  }

  const VariantParams& variant_;
  int32_t kv_count_, slice_, column_, kv_head_, kv_position_;
  TileRange range_;
  int32_t request_[C::kRowBlocks][2], q_idx_[C::kRowBlocks][2], q_head_[C::kRowBlocks][2];
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_MASK_CUH_
