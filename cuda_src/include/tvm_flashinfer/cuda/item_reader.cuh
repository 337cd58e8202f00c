// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Completes a work item to the record that consumers need.
#ifndef TVM_FLASHINFER_CUDA_ITEM_READER_CUH_
#define TVM_FLASHINFER_CUDA_ITEM_READER_CUH_

#include "launch_params.cuh"
#include "pipeline.cuh"
#include "platform.cuh"
#include "work_queue.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief Take the next item of a queue; by one warp, whose lanes call together.
 * \return false: no item is left.
 */
template <typename Variant>
__device__ __forceinline__ bool ReadItem(const LaunchParams& p, WorkQueue* queue, int lane,
                                         ItemInfo* info) {
  if (!queue->Pop(&info->item)) return false;
  const WorkItem& item = info->item;
  info->kv_position = p.plan.KVPosition(item.level, item.row) + item.kv_begin;
  info->pages = static_cast<int32_t>(p.plan.Pages(item.level, item.row) - p.plan.kv_indices);
  info->q_lo = INT32_MAX;
  info->q_hi = INT32_MIN;
  if constexpr (Variant::kHasMask) {
    for (int t = lane; t < item.q_count; t += kWarpSize) {
      const int position = p.plan.q_position[item.q_begin + t];
      info->q_lo = min(info->q_lo, position);
      info->q_hi = max(info->q_hi, position);
    }
#pragma unroll
    for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
      info->q_lo = min(info->q_lo, __shfl_xor_sync(0xffffffffu, info->q_lo, delta));
      info->q_hi = max(info->q_hi, __shfl_xor_sync(0xffffffffu, info->q_hi, delta));
    }
  }
  return true;
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_ITEM_READER_CUH_
