// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The work items of one block: its own queue, then whatever is left in the shared tail.
#ifndef TVM_FLASHINFER_CUDA_WORK_QUEUE_CUH_
#define TVM_FLASHINFER_CUDA_WORK_QUEUE_CUH_

#include "../params.h"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief Hands out work items to one warp, whose lanes call every member together. Which block
 * computes an item of the tail depends on timing; what it computes, and where that goes, does not.
 */
class WorkQueue {
 public:
  __device__ __forceinline__ WorkQueue(const AttentionParams& p, int lane)
      : plan_(p.plan),
        tickets_(p.tickets),
        lane_(lane),
        next_(p.plan.worker_indptr[blockIdx.x]),
        end_(p.plan.worker_indptr[blockIdx.x + 1]),
        tail_begin_(p.plan.worker_indptr[gridDim.x]),
        tail_end_(p.plan.header->num_items) {}

  /*! \return false: no item is left. */
  __device__ __forceinline__ bool Pop(WorkItem* item) {
    int index = next_++;
    if (index >= end_) {
      if (tail_begin_ >= tail_end_) return false;
      ptx::WaitForEarlierLaunches();  // the tickets may still be in use
      int drawn = lane_ == 0 ? ptx::AtomicAddOrdered(tickets_, 1) : 0;
      index = tail_begin_ + __shfl_sync(0xffffffffu, drawn, 0);
      if (index >= tail_end_) return false;
    }
    *item = plan_.items[index];
    return true;
  }

  /*! \brief After Pop's false. The last block to finish leaves the tickets as it found them. */
  __device__ __forceinline__ void Finish() const {
    if (tail_begin_ < tail_end_ && lane_ == 0) {
      const auto blocks = static_cast<int32_t>(gridDim.x);
      if (ptx::AtomicAddOrdered(tickets_ + 1, 1) == blocks - 1) {
        tickets_[0] = 0;
        tickets_[1] = 0;
      }
    }
  }

 private:
  const PlanView& plan_;
  int32_t* tickets_;
  int lane_, next_, end_, tail_begin_, tail_end_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WORK_QUEUE_CUH_
