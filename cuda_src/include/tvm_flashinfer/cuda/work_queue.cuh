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
 * \brief Hands out item indices. Which block computes an item of the tail depends on timing; what
 * it computes, and where the result goes, does not.
 *
 * All threads call every member together. A ticket for the tail is drawn while the item before it
 * is computed, so its latency is hidden.
 */
class WorkQueue {
 public:
  /*! \param slot Shared memory of one int32 that nothing else uses. */
  __device__ __forceinline__ WorkQueue(const AttentionParams& p, int32_t* slot)
      : tickets_(p.tickets),
        slot_(slot),
        next_(p.plan.worker_indptr[blockIdx.x]),
        own_end_(p.plan.worker_indptr[blockIdx.x + 1]),
        tail_begin_(p.plan.worker_indptr[gridDim.x]),
        tail_end_(p.plan.header->num_items) {
    // An empty queue has no item to hide the first draw behind.
    if (next_ >= own_end_) {
      Draw();
      Receive();
    }
  }

  __device__ __forceinline__ bool HasItem() const { return next_ < own_end_; }

  /*! \brief The current item. Draws the next ticket, if the tail is next. */
  __device__ __forceinline__ int Begin() {
    if (next_ + 1 >= own_end_) Draw();
    return next_;
  }

  /*! \brief Done with the current item, and with shared memory. */
  __device__ __forceinline__ void Advance() {
    ++next_;
    if (next_ >= own_end_) {
      Receive();
    } else {
      __syncthreads();
    }
  }

  /*! \brief The last block to finish leaves the tickets as it found them. */
  __device__ __forceinline__ void Finish() const {
    if (HasTail() && threadIdx.x == 0) {
      const auto blocks = static_cast<int32_t>(gridDim.x);
      if (ptx::AtomicAddOrdered(tickets_ + 1, 1) == blocks - 1) {
        tickets_[0] = 0;
        tickets_[1] = 0;
      }
    }
  }

 private:
  __device__ __forceinline__ bool HasTail() const { return tail_begin_ < tail_end_; }

  __device__ __forceinline__ void Draw() {
    if (HasTail() && threadIdx.x == 0) drawn_ = ptx::AtomicAddOrdered(tickets_, 1);
  }

  /*! \brief Make the drawn item, if there is one, the own queue's only one. */
  __device__ __forceinline__ void Receive() {
    if (HasTail()) {
      if (threadIdx.x == 0) *slot_ = drawn_;
      __syncthreads();
      next_ = tail_begin_ + *slot_;
      own_end_ = min(next_ + 1, tail_end_);
    }
    __syncthreads();
  }

  int32_t* tickets_;
  int32_t* slot_;
  int next_, own_end_, tail_begin_, tail_end_;
  int32_t drawn_ = 0;  //!< of thread 0
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WORK_QUEUE_CUH_
