// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The ring between producers and consumers, and the records of work items that travel beside it.
#ifndef TVM_FLASHINFER_CUDA_PIPELINE_CUH_
#define TVM_FLASHINFER_CUDA_PIPELINE_CUH_

#include "../plan.h"
#include "../variant.h"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief A work item as consumers need it: read once by a producer, ahead of time. */
struct ItemInfo {
  WorkItem item;
  int32_t kv_position;  //!< position of the chunk's first token in its request
  int32_t q_lo, q_hi;   //!< positions that the tile's queries span, if the variant masks
  int32_t pages;        //!< first of the row's page ids, in PlanView::kv_indices
  int32_t valid;        //!< 0: there are no more items
};
static_assert(sizeof(ItemInfo) <= 64, "an item slot is 64 bytes");

/*! \brief What the mask, and the chunk's end, do to KV tokens [first, first + count) of an item. */
template <typename Variant>
__device__ __forceinline__ TileClass ClassifyTokens(const typename Variant::Params& variant,
                                                    const ItemInfo& info, int first, int count) {
  if (first >= info.item.kv_count) return TileClass::kEmpty;
  const int end = min(first + count, info.item.kv_count);
  TileClass tile = TileClass::kFull;
  if constexpr (Variant::kHasMask) {
    tile = Variant::Classify(variant, TileRange{info.q_lo, info.q_hi, info.kv_position + first,
                                                info.kv_position + end - 1});
  }
  return tile == TileClass::kFull && end < first + count ? TileClass::kMixed : tile;
}

/*! \brief Position in a ring: a slot, and the parity of its current phase. */
template <int kSlots>
struct RingCursor {
  int slot = 0;
  int phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++slot == kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

/*! \brief Addresses of a block's shared memory (tile_config.cuh). */
template <typename C>
struct Pipeline {
  uint8_t* smem;
  uint32_t base;

  __device__ __forceinline__ explicit Pipeline(uint8_t* shared)
      : smem(shared), base(ptx::SharedAddress(shared)) {}

  __device__ __forceinline__ uint32_t K(int slot) const { return base + slot * C::kStageBytes; }
  __device__ __forceinline__ uint32_t V(int slot) const { return K(slot) + C::kKBytes; }
  __device__ __forceinline__ uint32_t Q(int slot) const {
    return base + C::kQOffset + slot * C::kQBytes;
  }
  __device__ __forceinline__ uint8_t* Scratch() const { return smem + C::kScratchOffset; }
  __device__ __forceinline__ ItemInfo* Info(int slot) const {
    return reinterpret_cast<ItemInfo*>(smem + C::kInfoOffset + slot * 64);
  }

  __device__ __forceinline__ uint32_t FullK(int slot) const { return Barrier(slot); }
  __device__ __forceinline__ uint32_t FullV(int slot) const { return Barrier(C::kStages + slot); }
  __device__ __forceinline__ uint32_t Empty(int slot) const {
    return Barrier(2 * C::kStages + slot);
  }
  /*! The record is there, the queries need not be. */
  __device__ __forceinline__ uint32_t RecordFull(int slot) const {
    return Barrier(3 * C::kStages + 2 * C::kItemSlots + slot);
  }
  __device__ __forceinline__ uint32_t ItemFull(int slot) const {
    return Barrier(3 * C::kStages + slot);
  }
  __device__ __forceinline__ uint32_t ItemEmpty(int slot) const {
    return Barrier(3 * C::kStages + C::kItemSlots + slot);
  }

  /*! \brief By one thread, before the block's first barrier. */
  __device__ __forceinline__ void Init() const {
    for (int i = 0; i < C::kStages; ++i) {
      // Of each loader: every lane's copies, and lane 0 for what the lanes stored themselves.
      ptx::MbarrierInit(FullK(i), C::kLoaders * (kWarpSize + 1));
      ptx::MbarrierInit(FullV(i), C::kLoaders * (kWarpSize + 1));
      ptx::MbarrierInit(Empty(i), C::kConsumerWarps);
    }
    for (int i = 0; i < C::kItemSlots; ++i) {
      // Filled alike, by one warp; consumers and the other producers let go.
      ptx::MbarrierInit(RecordFull(i), 1);
      ptx::MbarrierInit(ItemFull(i), kWarpSize + 1);
      ptx::MbarrierInit(ItemEmpty(i), C::kConsumerWarps + C::kProducerWarps - 1);
    }
  }

  /*! \brief Barrier of the consumers alone. */
  __device__ __forceinline__ static void SyncConsumers() {
    ptx::NamedBarrier(1, C::kConsumerThreads);
  }

 private:
  __device__ __forceinline__ uint32_t Barrier(int index) const {
    return base + C::kBarrierOffset + index * 8;
  }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_PIPELINE_CUH_
