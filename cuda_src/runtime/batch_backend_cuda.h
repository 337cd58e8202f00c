// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#ifndef TVM_FLASHINFER_RUNTIME_BATCH_BACKEND_CUDA_H_
#define TVM_FLASHINFER_RUNTIME_BATCH_BACKEND_CUDA_H_

#include <tvm/runtime/tensor.h>

#include <array>
#include <cstdint>
#include <memory>

#include "batch_backend.h"
#include "cuda_plan.h"

namespace tvm_flashinfer {

/*! \throws ValueError if a plan within these bounds can't be indexed. */
void CheckPlanSize(const PlanBounds& bounds);

/*!
 * \brief A GPU: launches on the FFI environment's stream.
 *
 * Every query tile has a plan of its own, made when a batch first takes it. A launch captured with
 * one serves every later batch that takes the same tile.
 */
class CudaBatchBackend final : public BatchBackend {
 public:
  CudaBatchBackend(const BatchAttentionConfig& config, const KernelHandle& kernel);

  void Plan(ScheduleInput* in, bool per_worker_queues) final;
  void Run(AttentionParams* params) final;
  void Append(const BatchAppend& append) final;
  const int32_t* plan() const final { return plan_->host(); }
  const PlanLayout& layout() const final { return plan_->layout(); }

 private:
  const CudaKernel& cuda() const { return kernel_.cuda(); }
  CudaPlan* PlanOf(int tile);

  BatchAttentionConfig config_;
  KernelHandle kernel_;
  int32_t parts_;  //!< see HeadParts
  std::array<std::unique_ptr<CudaPlan>, 4> plans_;
  CudaPlan* plan_ = nullptr;
  StagingRing append_stagings_;
  tvm::runtime::Tensor append_;  //!< slots and positions of the tokens that are stored
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_BATCH_BACKEND_CUDA_H_
