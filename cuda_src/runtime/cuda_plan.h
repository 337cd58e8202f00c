// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Plans on a GPU: made in page-locked memory, sent by one asynchronous copy, read by every launch
// until the next. A plan's place on the device never changes, so a captured launch serves it all.
#ifndef TVM_FLASHINFER_RUNTIME_CUDA_PLAN_H_
#define TVM_FLASHINFER_RUNTIME_CUDA_PLAN_H_

#include <tvm/runtime/tensor.h>
#include <tvm_flashinfer/cuda/kernel.h>
#include <tvm_flashinfer/schedule.h>

#include <array>
#include <cstdint>
#include <memory>

#include "step_plan.h"

namespace tvm_flashinfer {

/*! \brief The FFI environment's stream of a device, which becomes the current one. */
void* CurrentStream(DLDevice device);

/*! \brief Fill a tensor of floating point with NaN, and wait for it. */
void FillWithNaN(const tvm::runtime::Tensor& t);

/*! \throws RuntimeError if a call of a kernel table failed; `what` says what it was for. */
void CheckCuda(const char* error, const char* what);

/*!
 * \brief Index of the query tile for a batch.
 *
 * Of one level: the smallest that holds a row's mean query length. Of several: the smallest with
 * the least work, where a KV token costs a tile its bytes or, of 128 rows, its arithmetic.
 */
int ChooseTile(const CudaKernel& kernel, const ScheduleInput& in);

/*!
 * \brief What items cost in a tile's launch: as much whatever rows they fill, and their start as
 * many KV tokens as a merge of states and a first step take.
 */
void SetTileCosts(const CudaKernel& kernel, int tile, ScheduleInput* in);

/*!
 * \brief Into how many parts the query heads of a KV head are cut, so that a tile holds one.
 *
 * Each part reads the KV head as one of its own. \throws ValueError if that takes several KV heads,
 * or a variant that may tell them apart.
 */
int32_t HeadParts(const CudaKernel& kernel, int32_t num_qo_heads, int32_t num_kv_heads);

/*! \brief Page-locked host memory that grows on demand, and the event of its last copy. */
class StagingBuffer {
 public:
  explicit StagingBuffer(const CudaKernel& kernel);
  ~StagingBuffer();
  StagingBuffer(const StagingBuffer&) = delete;
  StagingBuffer& operator=(const StagingBuffer&) = delete;

  /*! \brief Memory of at least `bytes` that no copy in flight reads; its contents are lost. */
  char* Acquire(int64_t bytes);
  char* data() const { return data_; }
  /*! \brief Start the copy of the first `bytes`. */
  void Send(void* device, int64_t bytes, void* stream);
  /*! \brief Wait until the copy in flight, if there is one, has been made. */
  void Wait();

 private:
  const CudaKernel& kernel_;
  char* data_ = nullptr;
  int64_t capacity_ = 0;
  void* event_ = nullptr;
  bool in_flight_ = false;
};

/*! \brief Staging buffers in turn: the host runs ahead of the device by a few steps. */
class StagingRing {
 public:
  explicit StagingRing(const CudaKernel& kernel) {
    for (auto& buffer : buffers_) buffer = std::make_unique<StagingBuffer>(kernel);
  }
  /*! \brief As StagingBuffer::Acquire, of the next buffer; it becomes the current one by Use. */
  char* Acquire(int64_t bytes) { return buffers_[Next()]->Acquire(bytes); }
  void Use() { current_ = Next(); }
  StagingBuffer& current() { return *buffers_[current_]; }
  const StagingBuffer& current() const { return *buffers_[current_]; }

 private:
  static constexpr int kBuffers = 3;
  int Next() const { return (current_ + 1) % kBuffers; }

  std::array<std::unique_ptr<StagingBuffer>, kBuffers> buffers_;
  int current_ = 0;
};

/*! \brief Everything of one query tile: a scheduler, its plan, and the workspace of states. */
class CudaPlan {
 public:
  /*!
   * \param bounds Of the tile; workers are counted here where it has none.
   * \param header Bytes before the plan, the caller's own, sent along with it.
   */
  CudaPlan(const CudaKernel& kernel, PlanBounds bounds, int32_t tile_rows, int32_t num_qo_heads,
           int64_t header, DLDevice device);

  const PlanBounds& bounds() const { return bounds_; }
  const PlanLayout& layout() const { return scheduler_.layout(); }
  int32_t tile_rows() const { return tile_rows_; }
  int64_t id() const { return id_; }

  /*!
   * \brief Plan into staging memory; the plan in use stays until Send. A throw changes nothing.
   * \param num_pages Page-table entries of the batch.
   * \return The header, to be filled in.
   */
  char* Make(const ScheduleInput& in, int64_t num_pages);
  void Send(void* stream);
  /*! \brief Wait until what was sent is there. */
  void Wait() { stagings_.current().Wait(); }

  /*! \brief The plan made last, in host memory. */
  const int32_t* host() const {
    return reinterpret_cast<const int32_t*>(stagings_.current().data() + header_);
  }
  /*! \brief As it was staged; until two more plans are made. */
  PlanOnHost OnHost() const { return {host(), &layout()}; }
  /*! \brief The header, on the device. */
  const tvm::runtime::Tensor& block() const { return block_; }
  void Describe(AttentionParams* params) const;
  /*! \brief See StepRunner::PoisonWorkspace. */
  void PoisonWorkspace() const {
    FillWithNaN(o_partial_);
    FillWithNaN(lse_partial_);
  }

 private:
  PlanBounds bounds_;
  int32_t tile_rows_;
  int64_t header_, id_;
  Scheduler scheduler_;
  StagingRing stagings_;
  int64_t used_bytes_ = 0;
  tvm::runtime::Tensor block_;  //!< header and plan: as in staging memory
  tvm::runtime::Tensor o_partial_, lse_partial_, tickets_;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_CUDA_PLAN_H_
