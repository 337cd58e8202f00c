// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Steps on a GPU. Nothing is allocated and nothing waits for the GPU in a layer; a step's plan goes
// there in one asynchronous copy, so a captured step serves every later one.
#ifndef TVM_FLASHINFER_RUNTIME_CUDA_STEP_RUNNER_H_
#define TVM_FLASHINFER_RUNTIME_CUDA_STEP_RUNNER_H_

#include <algorithm>
#include <array>
#include <memory>
#include <optional>

#include "cuda_plan.h"
#include "step_runner.h"

namespace tvm_flashinfer {

class CudaStepRunner final : public StepRunner {
 public:
  CudaStepRunner(const KVCacheConfig& config, KernelHandle kernel, DLDevice device,
                 std::optional<RopeConfig> rope);

  void Plan(StepLayout* layout) final;
  void Begin(const StepLayout& layout) final;
  tvm::runtime::Tensor Positions() const final;
  tvm::runtime::Tensor Origins() const final;
  void Append(const PoolView& pool, TokenHeads* q, TokenHeads k, TokenHeads v,
              int32_t num_tokens) final;
  void Attend(AttentionParams* params) final;
  void Copy(void* to, const void* from, int64_t bytes) final;
  void Wait() final;
  PlanOnHost LastPlan() const final { return plan_ == nullptr ? PlanOnHost{} : plan_->OnHost(); }
  void Merge(const MergeOperands& m) final;
  void PoisonWorkspace() final;
  int64_t GraphKey() const final;

 private:
  const CudaKernel& cuda() const { return kernel_.cuda(); }
  void* Stream() const { return CurrentStream(device_); }
  int32_t group() const { return StepRunner::group() / parts_; }
  PlanBounds TileBounds(PlanBounds bounds, int32_t tile_rows, bool last) const;
  CudaPlan* PlanOf(int tile, const StepLayout& layout);
  /*! \brief Compose a step of that tile, or of a larger one, if that pays; returns its tile. */
  int Compose(int tile, ScheduleInput* in);
  /*! \brief Attend a step whose plan has the queries in another order. */
  void AttendInOrder(const AttentionParams& params);
  void Run(const AttentionParams& params);
  /*! \brief Make room for queries and outputs in another order. */
  void ReserveOrdered();
  ReadCosts PrefixCosts(int tile) const;
  //! What two launches more cost, in KV tokens that a layer reads: 4 us at some 4 KiB a token.
  static constexpr int64_t kMoveTokens = 3000;
  //! Rows whose products take a KV token's reading time: tensor cores outrun memory by far.
  static constexpr int32_t kMemoryRows = 64;
  int TileTokens(int tile) const { return std::max(1, cuda().tiles[tile] / group()); }

  // A plan's header: positions first, for compiled functions that read them accept no offset, then
  // origins, slots, and the order of queries where the plan has one of its own.
  static int64_t Align(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  // Compiled functions read positions and origins of padding too.
  int32_t HeaderTokens(const PlanBounds& b) const {
    return std::max(b.max_q_tokens, config_.max_q_tokens());
  }
  int64_t OriginsOffset(const PlanBounds& b) const {
    return Align(HeaderTokens(b) * int64_t{sizeof(int32_t)});
  }
  int64_t SlotsOffset(const PlanBounds& b) const { return 2 * OriginsOffset(b); }
  int64_t OrderOffset(const PlanBounds& b) const {
    return SlotsOffset(b) + Align(b.max_q_tokens * int64_t{sizeof(int64_t)});
  }
  int64_t HeaderBytes(const PlanBounds& b) const {
    return OrderOffset(b) + Align(b.max_q_tokens * int64_t{sizeof(int32_t)});
  }

  DLDevice device_;
  int32_t parts_;                                                      //!< see HeadParts
  std::array<std::unique_ptr<CudaPlan>, 4> page_plans_, token_plans_;  //!< made on demand
  CudaPlan* next_ = nullptr;                                           //!< planned
  CudaPlan* plan_ = nullptr;                                           //!< begun
  int32_t num_tokens_ = 0, num_queries_ = 0;
  bool splits_ = false, next_reorders_ = false, reorders_ = false;
  std::optional<RopeConfig> rope_;
  tvm::runtime::Tensor frequencies_;
  //! [max_q_tokens, heads, dim], where the cache rotates; twice as many where windows slide.
  tvm::runtime::Tensor rotated_q_;
  //! Queries and outputs of a step in the order of its plan; made when one first needs them.
  tvm::runtime::Tensor ordered_q_, ordered_o_, ordered_lse_;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_CUDA_STEP_RUNNER_H_
