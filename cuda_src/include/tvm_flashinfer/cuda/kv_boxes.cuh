// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Copies key and value tiles for the warpgroup kernel by the tensor memory accelerator, eight
// tokens of a page at a time.
#ifndef TVM_FLASHINFER_CUDA_KV_BOXES_CUH_
#define TVM_FLASHINFER_CUDA_KV_BOXES_CUH_

#include "../params.h"
#include "kv_maps.cuh"
#include "kv_rows.cuh"
#include "page_lookup.cuh"
#include "ptx.cuh"
#include "warpgroup_pipeline.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief One of four producer warps: the first copies K, the second V, the others queries.
 *
 * Boxes never cross a page, since pages and chunks begin at multiples of eight tokens
 * (ScheduleInput::kv_align).
 */
template <typename C, typename Variant>
class BoxLoader {
 public:
  using T = typename C::T;
  static constexpr int kBoxes = C::kStepKV / kBoxTokens;
  //! Boxes whose places are shuffled at once.
  static constexpr int kBatch = kBoxes < 8 ? kBoxes : 8;
  static_assert(kBoxes % kBatch == 0 && kBoxes <= kWarpSize,
                "every lane knows the place of one box at most");
  static_assert(C::KTile::kGroupBytes == C::kHeadDimQK * kBoxTokens * 2 &&
                    (C::kSharedKV || C::VTile::kGroupBytes == C::kHeadDimVO * kBoxTokens * 2),
                "a box is one stretch of a tile");

  __device__ __forceinline__ BoxLoader(const AttentionParams& p,
                                       const typename Variant::Params& variant, const KVMaps& maps,
                                       const WarpgroupPipeline<C>& pipeline, int warp, int lane)
      : p_(p),
        variant_(variant),
        maps_(maps),
        pipeline_(pipeline),
        lookup_(p.page_size),
        warp_(warp),
        lane_(lane) {}

  __device__ __forceinline__ void Load(const ItemInfo& info,
                                       const RingCursor<C::kItemSlots>& items) {
    if (warp_ == 0) {
      LoadSteps(info, [&](const TokenPlace& place, int count) { LoadK(info.item, place, count); });
    } else if (warp_ == 1) {
      if constexpr (C::kSharedKV) return;
      LoadSteps(info, [&](const TokenPlace& place, int count) { LoadV(info.item, place, count); });
    } else {
      ptx::WaitForEarlierLaunches();
      if constexpr (C::kQuerySlots == 1) {
        const RingCursor<C::kItemSlots> last = items.Before();
        ptx::MbarrierWait(pipeline_.ItemEmpty(last.slot), last.phase);
      }
      CopyQueries<C, Variant>(p_, info.item, pipeline_, items.slot, warp_ - 2, lane_);
    }
  }

 private:
  /*! \param load Called with the place of lane i's box, the i-th, and the step's tokens. */
  template <typename F>
  __device__ __forceinline__ void LoadSteps(const ItemInfo& info, F load) {
    const WorkItem& item = info.item;
    const int32_t* pages = p_.plan.kv_indices + info.pages;
    const auto find = [&](int step) {
      const bool exists = step >= 0 && lane_ < kBoxes;
      return lookup_.Find(pages, item, exists ? step * C::kStepKV + lane_ * kBoxTokens : -1);
    };
    StepsDown<C, Variant> steps(variant_, info);
    TokenPlace place = find(steps.step());
    ptx::WaitForEarlierLaunches();
    while (steps.step() >= 0) {
      const int count = min(C::kStepKV, item.kv_count - steps.step() * C::kStepKV);
      steps.Next();
      const TokenPlace ahead = find(steps.step());
      load(place, count);
      stages_.Advance();
      place = ahead;
    }
  }

  /*! Tokens past the chunk's end may be anything: their logits are masked. */
  __device__ __forceinline__ void LoadK(const WorkItem& item, const TokenPlace& place, int count) {
    using Tile = typename C::KTile;
    const uint32_t tile = pipeline_.K(stages_.slot), full = pipeline_.FullK(stages_.slot);
    ptx::MbarrierWait(pipeline_.EmptyK(stages_.slot), stages_.phase ^ 1);
    int boxes = CeilDiv(count, kBoxTokens);
    if constexpr (C::kSharedKV) {
      boxes = count / kBoxTokens;
      if (count < C::kStepKV && warp_ == 0)
        CopyEnd<Tile>(p_.k, p_.k_strides, item, place, count, tile);
    }
    CopyBoxes<Tile>(maps_.k, MapHead(p_.k_strides, item.head), place, boxes, tile, full);
  }

  __device__ __forceinline__ void LoadV(const WorkItem& item, const TokenPlace& place, int count) {
    using Tile = typename C::VTile;
    const uint32_t tile = pipeline_.V(stages_.slot), full = pipeline_.FullV(stages_.slot);
    ptx::MbarrierWait(pipeline_.EmptyV(stages_.slot), stages_.phase ^ 1);
    if (count < C::kStepKV) CopyEnd<Tile>(p_.v, p_.v_strides, item, place, count, tile);
    CopyBoxes<Tile>(maps_.v, MapHead(p_.v_strides, item.head), place, count / kBoxTokens, tile,
                    full);
  }

  /*!
   * \brief The part of a tile of values that whole boxes do not reach. Tokens past the chunk's end
   * are zeros: 0 x NaN of a stale row would not be.
   */
  template <typename Tile>
  __device__ __forceinline__ void CopyEnd(const void* pool, const KVStrides& strides,
                                          const WorkItem& item, const TokenPlace& place, int count,
                                          uint32_t tile) const {
    const T* v = static_cast<const T*>(pool) + item.head * strides.head;
    const int boxes = count / kBoxTokens;
    const int64_t first = __shfl_sync(0xffffffffu, place.Offset(strides), boxes);
#pragma unroll 1
    for (int copy = lane_; copy < (C::kStepKV - boxes * kBoxTokens) * Tile::kChunks;
         copy += kWarpSize) {
      const int row = copy / Tile::kChunks, chunk = copy % Tile::kChunks;
      const bool exists = boxes * kBoxTokens + row < count;
      const int64_t from = exists ? first + row * strides.token : 0;
      ptx::CpAsync16OrZero(tile + Tile::Offset(boxes * kBoxTokens + row, chunk),
                           v + from + chunk * kElementsPerChunk, exists);
    }
    ptx::WaitForCopies();
    ptx::FenceAsyncProxy();
    __syncwarp();
  }

  template <typename Tile>
  __device__ __forceinline__ void CopyBoxes(const ptx::TensorMap& map, int head,
                                            const TokenPlace& place, int boxes, uint32_t tile,
                                            uint32_t full) const {
    if (ptx::ElectOne()) ptx::MbarrierArriveExpect(full, boxes * Tile::kGroupBytes);
#pragma unroll
    for (int first = 0; first < kBoxes; first += kBatch) {
      int page[kBatch], entry[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        page[i] = __shfl_sync(0xffffffffu, place.page, first + i);
        entry[i] = __shfl_sync(0xffffffffu, place.entry, first + i);
      }
      if (ptx::ElectOne()) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i >= boxes) break;
          ptx::CopyBox(tile + (first + i) * Tile::kGroupBytes, map, {0, entry[i], 0, head, page[i]},
                       full);
        }
      }
      __syncwarp();
    }
  }

  const AttentionParams& p_;
  const typename Variant::Params& variant_;
  const KVMaps& maps_;
  const WarpgroupPipeline<C>& pipeline_;
  PageLookup lookup_;
  int warp_, lane_;
  RingCursor<C::kStages> stages_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KV_BOXES_CUH_
