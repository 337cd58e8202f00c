// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Copies key and value tiles for the warpgroup kernel by the tensor memory accelerator, eight
// tokens of a page at a time.
#ifndef TVM_FLASHINFER_CUDA_KV_BOXES_CUH_
#define TVM_FLASHINFER_CUDA_KV_BOXES_CUH_

#include "kv_maps.cuh"
#include "kv_rows.cuh"
#include "launch_params.cuh"
#include "page_lookup.cuh"
#include "ptx.cuh"
#include "warpgroup_pipeline.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief One of four producer warps: the first copies K, the second V, or half of K where values
 * start their keys, the others queries, unless consumers do.
 *
 * Boxes never cross a page, since pages and chunks begin at multiples of eight tokens
 * (ScheduleInput::kv_align).
 */
template <typename C, typename Variant>
class BoxLoader {
 public:
  using T = typename C::T;
  static constexpr int kBoxes = C::kStepKV / kBoxTokens;
  static_assert(kBoxes <= kWarpSize, "every lane knows the place of one box at most");
  static_assert(C::KTile::kGroupBytes == C::kHeadDimQK * kBoxTokens * 2 &&
                    (C::kSharedKV || C::VTile::kGroupBytes == C::kHeadDimVO * kBoxTokens * 2),
                "a box is one stretch of a tile");

  __device__ __forceinline__ BoxLoader(const LaunchParams& p,
                                       const typename Variant::Params& variant, const KVMaps& maps,
                                       const WarpgroupPipeline<C>& pipeline, int warp, int lane)
      : p_(p), variant_(variant), maps_(maps), pipeline_(pipeline), warp_(warp), lane_(lane) {}

  __device__ __forceinline__ void Load(const ItemInfo& info,
                                       const RingCursor<C::kItemSlots>& items) {
    if (warp_ == 0) {
      LoadSteps(info, [&](const TokenPlace& place, const StageRecord& stage) {
        LoadK(info.item, place, stage);
      });
    } else if (warp_ == 1) {
      LoadSteps(info, [&](const TokenPlace& place, const StageRecord& stage) {
        if constexpr (C::kSharedKV) {
          LoadK(info.item, place, stage);
        } else {
          LoadV(info.item, place, stage);
        }
      });
    } else if constexpr (C::kQueryWarps > 0) {
      ptx::WaitForEarlierLaunches();
      CopyQueries<C, Variant>(p_, info.item, pipeline_, items.slot, warp_ - 2, lane_);
    }
  }

 private:
  /*! \param load Called with the place of lane i's box, the i-th, and the stage it goes to. */
  template <typename F>
  __device__ __forceinline__ void LoadSteps(const ItemInfo& info, F load) {
    const WorkItem& item = info.item;
    const int32_t* pages = p_.plan.kv_indices + info.pages;
    const auto find = [&](int step) {
      const bool exists = step >= 0 && lane_ < kBoxes;
      return FindToken(p_, pages, item, exists ? step * C::kStepKV + lane_ * kBoxTokens : -1);
    };
    StepsDown<C, Variant> steps(variant_, info);
    StageRecord stage{steps.step(), steps.tile(), 0};
    TokenPlace place = find(stage.step);
    if (C::kStageRecords && stage.step >= 0) steps.Next();
    ptx::WaitForEarlierLaunches();
    if constexpr (C::kSharedKV) {
      // What is asked for after a ring of keys comes after them, and nothing begins without
      // queries.
      if (first_) ptx::NamedBarrier(C::kQueriesAsked, C::kQueriesAskedThreads);
      first_ = false;
    }
    while (stage.step >= 0) {
      if constexpr (!C::kStageRecords) steps.Next();
      const StageRecord next{steps.step(), steps.tile(), 0};
      const TokenPlace ahead = find(next.step);
      if constexpr (C::kStageRecords) {
        if (next.step >= 0) steps.Next();
        stage.followers = next.step < 0 ? 0 : steps.step() < 0 ? 1 : 2;
      }
      load(place, stage);
      stages_.Advance();
      stage = next;
      place = ahead;
    }
  }

  /*! Tokens past the chunk's end may be anything, unless they are values: logits are masked. */
  __device__ __forceinline__ void LoadK(const WorkItem& item, const TokenPlace& place,
                                        const StageRecord& stage) {
    using Tile = typename C::KTile;
    const uint32_t tile = pipeline_.K(stages_.slot), full = pipeline_.FullK(stages_.slot);
    ptx::MbarrierWait(pipeline_.EmptyK(stages_.slot), stages_.phase ^ 1);
    if constexpr (C::kStageRecords) {
      if (warp_ == 0 && ptx::ElectOne()) *pipeline_.Stage(stages_.slot) = stage;
    }
    const int cut = C::kSharedKV ? CutBox(item, stage) : -1;
    if (cut >= 0 && warp_ == 0) CopyCutBox<Tile>(p_.k, p_.k_strides, item, place, cut, tile);
    CopyBoxes<Tile, C::kParts, C::kTileArrivals>(maps_.k, MapHead(p_.k_strides, item.head), place,
                                                 cut, tile, full);
  }

  __device__ __forceinline__ void LoadV(const WorkItem& item, const TokenPlace& place,
                                        const StageRecord& stage) {
    using Tile = typename C::VTile;
    const uint32_t tile = pipeline_.V(stages_.slot), full = pipeline_.FullV(stages_.slot);
    ptx::MbarrierWait(pipeline_.EmptyV(stages_.slot), stages_.phase ^ 1);
    const int cut = CutBox(item, stage);
    if (cut >= 0) CopyCutBox<Tile>(p_.v, p_.v_strides, item, place, cut, tile);
    CopyBoxes<Tile, 1, 1>(maps_.v, MapHead(p_.v_strides, item.head), place, cut, tile, full);
  }

  /*! \return The box of a stage that the chunk ends in, or -1. */
  __device__ __forceinline__ static int CutBox(const WorkItem& item, const StageRecord& stage) {
    const int count = item.kv_count - stage.step * C::kStepKV;
    return count < C::kStepKV && count % kBoxTokens != 0 ? count / kBoxTokens : -1;
  }

  /*!
   * \brief The box of values that the chunk ends in. Tokens past the end are zeros: 0 x NaN of a
   * stale row would not be.
   */
  template <typename Tile>
  __device__ __forceinline__ void CopyCutBox(const void* pool, const KVStrides& strides,
                                             const WorkItem& item, const TokenPlace& place, int box,
                                             uint32_t tile) const {
    const T* v = static_cast<const T*>(pool) + item.head * strides.head;
    const int64_t first = __shfl_sync(0xffffffffu, place.Offset(strides), box);
    const int rows = item.kv_count % kBoxTokens;  // steps are of whole boxes
#pragma unroll 1
    for (int copy = lane_; copy < kBoxTokens * Tile::kChunks; copy += kWarpSize) {
      const int row = copy / Tile::kChunks, chunk = copy % Tile::kChunks;
      ptx::CpAsync16OrZero(
          tile + Tile::Offset(box * kBoxTokens + row, chunk),
          v + first + min(row, rows - 1) * strides.token + chunk * kElementsPerChunk, row < rows);
    }
    ptx::WaitForCopies();
    ptx::FenceAsyncProxy();
    __syncwarp();
  }

  /*!
   * \brief This warp's boxes of a tile, of kWarps' that take them in turn, part by part. Those past
   * the chunk's end lie outside of the pool (page -1), and so are zeros.
   * \param but One that is there already, or -1.
   * \param full The barrier of the first part; the others follow it.
   */
  template <typename Tile, int kParts, int kWarps>
  __device__ __forceinline__ void CopyBoxes(const ptx::TensorMap& map, int head,
                                            const TokenPlace& place, int but, uint32_t tile,
                                            uint32_t full) const {
    constexpr int kOwn = kBoxes / kWarps, kBatch = kOwn < 8 ? kOwn : 8;  // shuffled at once
    static_assert(kBoxes % kWarps == 0 && kOwn % kBatch == 0 && (kParts == 1 || kOwn == kBatch),
                  "boxes come in whole batches, and parts of boxes in one");
    constexpr int kPanels = Tile::kGroupBytes / Tile::kPanelBytes / kParts;
    const int first_box = kWarps == 1 ? 0 : warp_;
    const int own = kOwn - (but >= 0 && but % kWarps == first_box);
    if (ptx::ElectOne()) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        ptx::MbarrierArriveExpect(full + part * 8, own * kPanels * Tile::kPanelBytes);
      }
    }
#pragma unroll
    for (int first = 0; first < kOwn; first += kBatch) {
      int page[kBatch], entry[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int box = first_box + (first + i) * kWarps;
        page[i] = __shfl_sync(0xffffffffu, place.page, box);
        entry[i] = __shfl_sync(0xffffffffu, place.entry, box);
      }
      if (ptx::ElectOne()) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int box = first_box + (first + i) * kWarps;
            if (box == but) continue;
            ptx::CopyBox(tile + box * Tile::kGroupBytes + part * kPanels * Tile::kPanelBytes, map,
                         {0, entry[i], part * kPanels, head, page[i]}, full + part * 8);
          }
        }
      }
      __syncwarp();
    }
  }

  const LaunchParams& p_;
  const typename Variant::Params& variant_;
  const KVMaps& maps_;
  const WarpgroupPipeline<C>& pipeline_;
  bool first_ = true;  //!< no item has been loaded yet
  int warp_, lane_;
  RingCursor<C::kStages> stages_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KV_BOXES_CUH_
