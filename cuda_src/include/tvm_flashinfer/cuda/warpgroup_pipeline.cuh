// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What producers and consumers of the warpgroup kernel share: rings of K and of V tiles, query
// tiles, records of work items, and their barriers.
#ifndef TVM_FLASHINFER_CUDA_WARPGROUP_PIPELINE_CUH_
#define TVM_FLASHINFER_CUDA_WARPGROUP_PIPELINE_CUH_

#include "pipeline.cuh"
#include "platform.cuh"
#include "ptx.cuh"
#include "query_row.cuh"
#include "stage_record.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Addresses of a block's shared memory (warpgroup_config.cuh). */
template <typename C>
struct WarpgroupPipeline {
  uint8_t* smem;
  uint32_t base;

  __device__ __forceinline__ explicit WarpgroupPipeline(uint8_t* shared)
      : smem(shared), base(ptx::SharedAddress(shared)) {}

  __device__ __forceinline__ uint32_t K(int slot) const { return base + slot * C::KTile::kBytes; }
  __device__ __forceinline__ uint32_t V(int slot) const {
    return base + C::kVOffset + slot * C::VTile::kBytes;
  }
  __device__ __forceinline__ uint32_t Q(int slot) const {
    return base + C::kQOffset + slot * C::QTile::kBytes;
  }
  __device__ __forceinline__ uint8_t* Scratch() const { return smem + C::kScratchOffset; }
  __device__ __forceinline__ ItemInfo* Info(int slot) const {
    return reinterpret_cast<ItemInfo*>(smem + C::kInfoOffset + slot * 64);
  }

  __device__ __forceinline__ StageRecord* Stage(int slot) const {
    return reinterpret_cast<StageRecord*>(smem + C::kStagesOffset) + slot;
  }

  __device__ __forceinline__ QueryRow* Rows(int slot) const {
    return reinterpret_cast<QueryRow*>(smem + C::kRowsOffset + slot * C::kRowsBytes);
  }

  __device__ __forceinline__ uint32_t FullK(int slot, int part = 0) const {
    return Barrier(3 * C::kStages + slot * C::kParts + part);
  }
  __device__ __forceinline__ uint32_t FullV(int slot) const { return Barrier(slot); }
  __device__ __forceinline__ uint32_t EmptyK(int slot) const { return Barrier(C::kStages + slot); }
  __device__ __forceinline__ uint32_t EmptyV(int slot) const {
    return Barrier(2 * C::kStages + slot);
  }
  __device__ __forceinline__ uint32_t RecordFull(int slot) const {
    return Barrier(kRingBarriers + slot);
  }
  __device__ __forceinline__ uint32_t QueriesFull(int slot) const {
    return Barrier(kRingBarriers + C::kItemSlots + slot);
  }
  /*! Record and queries of the slot are no longer needed. */
  __device__ __forceinline__ uint32_t ItemEmpty(int slot) const {
    return Barrier(kRingBarriers + 2 * C::kItemSlots + slot);
  }

  /*! \brief By one thread, before the block's first barrier. */
  __device__ __forceinline__ void Init() const {
    for (int i = 0; i < C::kStages; ++i) {
      for (int part = 0; part < C::kParts; ++part) {
        ptx::MbarrierInit(FullK(i, part), C::kTileArrivals);
      }
      ptx::MbarrierInit(FullV(i), C::kTileArrivals);
      ptx::MbarrierInit(EmptyK(i), C::kConsumerWarps);
      ptx::MbarrierInit(EmptyV(i), C::kConsumerWarps);
    }
    for (int i = 0; i < C::kItemSlots; ++i) {
      ptx::MbarrierInit(RecordFull(i), 1);
      if constexpr (C::kQueryWarps > 0) {
        // Every lane's copies, and lane 0 for what the lanes stored themselves.
        ptx::MbarrierInit(QueriesFull(i), C::kQueryWarps * (kWarpSize + 1));
      }
      ptx::MbarrierInit(ItemEmpty(i), C::kConsumerWarps + C::kProducerWarps);
    }
  }

 private:
  static constexpr int kRingBarriers = (3 + C::kParts) * C::kStages;

  __device__ __forceinline__ uint32_t Barrier(int index) const {
    return base + C::kBarrierOffset + index * 8;
  }
};

/*!
 * \brief The steps of an item that a variant does not empty, from the last one on: under a causal
 * mask those that need masking come first.
 */
template <typename C, typename Variant>
class StepsDown {
 public:
  __device__ __forceinline__ StepsDown(const typename Variant::Params& variant,
                                       const ItemInfo& info)
      : variant_(variant), info_(info), step_(CeilDiv(info.item.kv_count, C::kStepKV)) {
    Next();
  }
  /*! \return The current step, or -1: there are no more. */
  __device__ __forceinline__ int step() const { return step_; }
  /*! \brief Of the current step; not kEmpty. */
  __device__ __forceinline__ TileClass tile() const { return tile_; }
  __device__ __forceinline__ void Next() {
    while (--step_ >= 0) {
      tile_ = ClassifyTokens<Variant>(variant_, info_, step_ * C::kStepKV, C::kStepKV);
      if (tile_ != TileClass::kEmpty) return;
    }
  }

 private:
  const typename Variant::Params& variant_;
  const ItemInfo& info_;
  int step_;
  TileClass tile_ = TileClass::kEmpty;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WARPGROUP_PIPELINE_CUH_
