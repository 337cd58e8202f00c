// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Steps on a GPU. Nothing is allocated and nothing waits for the GPU in a layer; a step's plan goes
// there in one asynchronous copy, so a captured step serves every later one.
#ifndef TVM_FLASHINFER_RUNTIME_CUDA_STEP_RUNNER_H_
#define TVM_FLASHINFER_RUNTIME_CUDA_STEP_RUNNER_H_

#include <tvm_flashinfer/schedule.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>

#include "step_runner.h"

namespace tvm_flashinfer {

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

 private:
  const CudaKernel& kernel_;
  char* data_ = nullptr;
  int64_t capacity_ = 0;
  void* event_ = nullptr;
  bool in_flight_ = false;
};

/*!
 * \brief Everything of one query tile: a scheduler, its plan on the device beside the slots and
 * positions of the step's tokens, and the workspace of partial states.
 */
class CudaPlan {
 public:
  /*! \param max_tokens Query tokens of a step that takes this tile. */
  CudaPlan(const CudaKernel& kernel, const KVCacheConfig& config, PlanBounds bounds,
           int32_t tile_rows, DLDevice device);

  const PlanBounds& bounds() const { return bounds_; }
  int32_t tile_rows() const { return tile_rows_; }
  int64_t id() const { return id_; }

  /*! \brief Plan into staging memory; the plan in use stays until Send. */
  void Make(const ScheduleInput& in, const StepLayout& layout);
  void Send(void* stream);

  /*! \brief As it was staged; until two more plans are made. */
  PlanOnHost OnHost() const;
  const int64_t* slots() const;
  const tvm::runtime::Tensor& positions() const { return positions_; }
  void Describe(AttentionParams* params) const;

 private:
  static constexpr int kStagings = 3;

  // Positions come first: compiled functions that read them accept no offset.
  int64_t slots_offset() const { return Align(bounds_.max_q_tokens * int64_t{sizeof(int32_t)}); }
  int64_t plan_offset() const {
    return slots_offset() + Align(bounds_.max_q_tokens * int64_t{sizeof(int64_t)});
  }
  static int64_t Align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  PlanBounds bounds_;
  int32_t tile_rows_;
  int64_t id_;
  Scheduler scheduler_;
  std::array<std::unique_ptr<StagingBuffer>, kStagings> stagings_;
  int current_ = 0;
  int64_t used_bytes_ = 0;
  tvm::runtime::Tensor block_;  //!< positions, slots, plan: as in staging memory
  tvm::runtime::Tensor positions_;
  tvm::runtime::Tensor o_partial_, lse_partial_, tickets_;
};

class CudaStepRunner final : public StepRunner {
 public:
  CudaStepRunner(const KVCacheConfig& config, KernelHandle kernel, DLDevice device,
                 std::optional<RopeConfig> rope);

  void Plan(StepLayout* layout) final;
  void Begin(const StepLayout& layout) final;
  tvm::runtime::Tensor Positions() const final { return plan_->positions(); }
  void Append(const PoolView& pool, TokenHeads* q, TokenHeads k, TokenHeads v) final;
  void Attend(AttentionParams* params) final;
  void Copy(void* to, const void* from, int64_t bytes) final;
  void Wait() final;
  PlanOnHost LastPlan() const final { return plan_ == nullptr ? PlanOnHost{} : plan_->OnHost(); }
  int64_t GraphKey() const final { return plan_ == nullptr ? -1 : plan_->id(); }

 private:
  const CudaKernel& cuda() const { return kernel_.cuda(); }
  /*! The stream of the FFI environment; the device becomes the current one. */
  void* Stream() const;
  PlanBounds TileBounds(PlanBounds bounds, int32_t tile_rows, bool last) const;
  CudaPlan* PlanOf(int tile, const StepLayout& layout);
  /*! \brief Compose a step of that tile, or of a larger one, if that pays; returns its tile. */
  int Compose(int tile, ScheduleInput* in);
  ReadCosts PrefixCosts(int tile) const;
  //! Rows whose products take a KV token's reading time: tensor cores outrun memory by far.
  static constexpr int32_t kMemoryRows = 64;
  int TileTokens(int tile) const { return std::max(1, cuda().tiles[tile] / group()); }

  DLDevice device_;
  std::array<std::unique_ptr<CudaPlan>, 4> page_plans_, token_plans_;  //!< made on demand
  CudaPlan* next_ = nullptr;                                           //!< planned
  CudaPlan* plan_ = nullptr;                                           //!< begun
  int32_t num_tokens_ = 0;
  std::optional<RopeConfig> rope_;
  tvm::runtime::Tensor frequencies_;
  tvm::runtime::Tensor rotated_q_;  //!< [max_q_tokens, heads, dim], where the cache rotates
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_CUDA_STEP_RUNNER_H_
