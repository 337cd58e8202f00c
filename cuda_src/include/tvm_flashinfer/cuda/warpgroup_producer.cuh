// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The producers of the warpgroup kernel: four warps, which run ahead of the consumers across work
// items. One of them also takes the items and publishes their records.
#ifndef TVM_FLASHINFER_CUDA_WARPGROUP_PRODUCER_CUH_
#define TVM_FLASHINFER_CUDA_WARPGROUP_PRODUCER_CUH_

#include "item_reader.cuh"
#include "kv_boxes.cuh"
#include "kv_rows.cuh"
#include "launch_params.cuh"
#include "ptx.cuh"
#include "warpgroup_pipeline.cuh"
#include "work_queue.cuh"

namespace tvm_flashinfer {
namespace cuda {

template <typename C, typename Variant>
class WarpgroupProducer {
 public:
  using Loader = std::conditional_t<C::kBoxes, BoxLoader<C, Variant>, RowLoader<C, Variant>>;

  /*! \param warp This warp among the producers. */
  __device__ __forceinline__ WarpgroupProducer(const LaunchParams& p,
                                               const typename Variant::Params& variant,
                                               const typename C::Maps& maps,
                                               const WarpgroupPipeline<C>& pipeline, int warp,
                                               int lane)
      : p_(p),
        pipeline_(pipeline),
        loader_(p, variant, maps, pipeline, warp, lane),
        warp_(warp),
        lane_(lane) {}

  __device__ __forceinline__ void Run() {
    WorkQueue queue(p_.plan);
    ItemInfo next;
    if (warp_ == C::kLeadWarp) next.valid = ReadItem<Variant>(p_, &queue, lane_, &next);
    while (true) {
      if (warp_ == C::kLeadWarp) Publish(next);
      ptx::MbarrierWait(pipeline_.RecordFull(items_.slot), items_.phase);
      const ItemInfo& info = *pipeline_.Info(items_.slot);
      if (info.valid == 0) break;
      // The next item's record is read in the shadow of this one's copies.
      if (warp_ == C::kLeadWarp) next.valid = ReadItem<Variant>(p_, &queue, lane_, &next);
      loader_.Load(info, items_);
      __syncwarp();
      if (lane_ == 0) ptx::MbarrierArrive(pipeline_.ItemEmpty(items_.slot));
      items_.Advance();
    }
  }

 private:
  __device__ __forceinline__ void Publish(const ItemInfo& info) const {
    ptx::MbarrierWait(pipeline_.ItemEmpty(items_.slot), items_.phase ^ 1);
    if (lane_ == 0) {
      *pipeline_.Info(items_.slot) = info;
      ptx::MbarrierArrive(pipeline_.RecordFull(items_.slot));
    }
  }

  const LaunchParams& p_;
  const WarpgroupPipeline<C>& pipeline_;
  Loader loader_;
  int warp_, lane_;
  RingCursor<C::kItemSlots> items_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WARPGROUP_PRODUCER_CUH_
