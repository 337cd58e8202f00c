// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#ifndef TVM_FLASHINFER_RUNTIME_CPU_STEP_RUNNER_H_
#define TVM_FLASHINFER_RUNTIME_CPU_STEP_RUNNER_H_

#include <memory>
#include <optional>

#include "cpu_executor.h"
#include "step_plan.h"
#include "step_runner.h"

namespace tvm_flashinfer {

/*! \brief Steps on TVM's thread pool. */
class CpuStepRunner final : public StepRunner {
 public:
  CpuStepRunner(const KVCacheConfig& config, KernelHandle kernel, std::optional<RopeConfig> rope);

  void Plan(StepLayout* layout) final;
  void Begin(const StepLayout& layout) final;
  tvm::runtime::Tensor Positions() const final { return positions_; }
  tvm::runtime::Tensor Origins() const final { return origins_; }
  void Append(const PoolView& pool, TokenHeads* q, TokenHeads k, TokenHeads v,
              int32_t num_tokens) final;
  void Attend(AttentionParams* params) final;
  void Copy(void* to, const void* from, int64_t bytes) final;
  void Wait() final {}  // every call returns when it is done
  void Merge(const MergeOperands& m) final;
  int64_t GraphKey() const final { return 0; }  // nothing is captured on a CPU
  PlanOnHost LastPlan() const final { return plan_ == nullptr ? PlanOnHost{} : plan_->OnHost(); }

 private:
  ReadCosts PrefixCosts() const;
  void AttendInOrder(const AttentionParams& params, const std::vector<int32_t>& order);

  CpuExecutor executor_;
  StepPlan page_plan_;
  std::unique_ptr<StepPlan> token_plan_;  //!< of layouts by token; made, and grown, on demand
  StepPlan* plan_ = nullptr;              //!< the one in use
  const StepLayout* layout_ = nullptr;
  tvm::runtime::Tensor positions_, origins_;
  std::unique_ptr<char[]> ordered_;  //!< queries and outputs of a step whose requests change places
  std::unique_ptr<float[]> ordered_lse_;
  std::optional<Rope> rope_, twin_rope_;        //!< the second of the twins of a step that splits
  tvm::runtime::Tensor rotated_q_, rotated_k_;  //!< [max_q_tokens, heads, dim]; q with its twins
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_CPU_STEP_RUNNER_H_
