// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The work items of one block.
#ifndef TVM_FLASHINFER_CUDA_WORK_QUEUE_CUH_
#define TVM_FLASHINFER_CUDA_WORK_QUEUE_CUH_

#include "../params.h"
#include "platform.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief The queue of the worker that this block is. */
class WorkQueue {
 public:
  __device__ __forceinline__ explicit WorkQueue(const PlanView& plan)
      : plan_(plan),
        next_(plan.worker_indptr[blockIdx.x]),
        end_(plan.worker_indptr[blockIdx.x + 1]) {}

  /*! \return false: no item is left. */
  __device__ __forceinline__ bool Pop(WorkItem* item) {
    if (next_ >= end_) return false;
    *item = plan_.items[next_++];
    return true;
  }

 private:
  const PlanView& plan_;
  int next_, end_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WORK_QUEUE_CUH_
