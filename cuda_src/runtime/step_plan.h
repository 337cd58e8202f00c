// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// A scheduler and what its plans need: two plan buffers and the workspace of partial states.
#ifndef TVM_FLASHINFER_RUNTIME_STEP_PLAN_H_
#define TVM_FLASHINFER_RUNTIME_STEP_PLAN_H_

#include <tvm_flashinfer/params.h>
#include <tvm_flashinfer/schedule.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace tvm_flashinfer {

/*! \brief A plan in host memory; null before the first. */
struct PlanOnHost {
  const int32_t* buffer = nullptr;
  const PlanLayout* layout = nullptr;
};

class StepPlan {
 public:
  StepPlan(const PlanBounds& bounds, int32_t num_qo_heads, int32_t head_dim_vo)
      : bounds_(bounds), scheduler_(bounds) {
    const PlanLayout& layout = scheduler_.layout();
    for (auto& buffer : buffers_) buffer.resize(layout.total);
    // Not initialised: few of the rows are ever touched.
    o_partial_.reset(new float[layout.max_partials * num_qo_heads * head_dim_vo]);
    softmax_partial_.reset(new float[2 * layout.max_partials * num_qo_heads]);
  }

  const PlanBounds& bounds() const { return bounds_; }

  /*! \brief Plan into the buffer that is not in use, then use it. A throw changes nothing. */
  void Make(const ScheduleInput& in) {
    const int32_t next = current_ ^ 1;
    scheduler_.Plan(in, buffers_[next].data());
    current_ = next;
  }

  PlanOnHost OnHost() const { return {buffers_[current_].data(), &scheduler_.layout()}; }

  /*! \brief Point the operands of a run at the plan in use and at its workspace. */
  void Describe(AttentionParams* params) {
    params->plan = PlanView::Make(buffers_[current_].data(), scheduler_.layout(), bounds_);
    params->o_partial = o_partial_.get();
    params->softmax_partial = softmax_partial_.get();
  }

 private:
  PlanBounds bounds_;
  Scheduler scheduler_;
  std::vector<int32_t> buffers_[2];
  int32_t current_ = 0;
  std::unique_ptr<float[]> o_partial_, softmax_partial_;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_STEP_PLAN_H_
