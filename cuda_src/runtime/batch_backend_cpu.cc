// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include <algorithm>
#include <memory>
#include <vector>

#include "batch_backend.h"
#include "batch_backend_cuda.h"
#include "check.h"
#include "cpu_executor.h"

namespace tvm_flashinfer {
namespace {

PlanBounds Derive(const BatchAttentionConfig& config, const CpuKernel& kernel) {
  const int32_t group = config.num_qo_heads / config.num_kv_heads;
  PlanBounds bounds = config.bounds;
  bounds.num_kv_heads = config.num_kv_heads;
  bounds.max_tile_tokens = std::max(1, kernel.row_tiles[1] / group);
  bounds = CpuExecutor::Bounds(bounds, kernel, group);
  if (config.bounds.num_workers > 0) bounds.num_workers = config.bounds.num_workers;
  CheckPlanSize(bounds);
  return bounds;
}

/*! Plans are double-buffered: one that fails leaves the one in use alone. */
class CpuBatchBackend final : public BatchBackend {
 public:
  CpuBatchBackend(const BatchAttentionConfig& config, const KernelHandle& kernel)
      : num_kv_heads_(config.num_kv_heads),
        scheduler_(Derive(config, kernel.cpu())),
        executor_(kernel,
                  std::max(kernel->row_tiles[1], config.num_qo_heads / config.num_kv_heads)) {
    const PlanLayout& layout = scheduler_.layout();
    for (auto& plan : plans_) plan.resize(layout.total);
    const int64_t states = layout.max_partials * config.num_qo_heads;
    o_partial_.reset(new float[states * config.head_dim_vo]);
    softmax_partial_.reset(new float[2 * states]);
  }

  void Plan(ScheduleInput* in, bool per_worker_queues) final {
    // A tile never leaves its row, and the kernel picks its path by the rows a tile really has: the
    // largest tile is right for decode rows too, and doesn't depend on the rest of the batch.
    in->tile_tokens = scheduler_.bounds().max_tile_tokens;
    in->shared_queue = !per_worker_queues;
    const int32_t next = current_ ^ 1;
    scheduler_.Plan(*in, plans_[next].data());
    current_ = next;
  }

  void Run(AttentionParams* params) final {
    params->o_partial = o_partial_.get();
    params->softmax_partial = softmax_partial_.get();
    params->plan =
        PlanView::Make(plans_[current_].data(), scheduler_.layout(), scheduler_.bounds());
    executor_.Run(*params);
  }

  void Append(const BatchAppend& append) final {
    for (const bool values : {false, true}) {
      const TokenView& source = values ? append.v_new : append.k_new;
      const PoolView& to = values ? append.v : append.k;
      AppendParams params{};
      params.source = source.data;
      params.source_token_stride = source.token_stride;
      params.source_head_stride = source.head_stride;
      params.pool = to.data;
      params.strides = to.strides;
      params.slots = append.slots;
      params.page_size = static_cast<int32_t>(to.page_size);
      params.num_heads = num_kv_heads_;
      params.positions = append.positions;
      params.variant_params = append.variant;
      params.values = values;
      executor_.Append(params, append.num_tokens);
    }
  }

  const int32_t* plan() const final { return plans_[current_].data(); }
  const PlanLayout& layout() const final { return scheduler_.layout(); }

 private:
  int32_t num_kv_heads_;
  Scheduler scheduler_;
  CpuExecutor executor_;
  std::vector<int32_t> plans_[2];
  int32_t current_ = 0;
  std::unique_ptr<float[]> o_partial_, softmax_partial_;  //!< not cleared: most is never touched
};

}  // namespace

void CheckPlanSize(const PlanBounds& bounds) {
  const int64_t total = PlanLayout::Make(bounds).total;
  TVM_FLASHINFER_CHECK(total <= INT32_MAX, ValueError)
      << "argument `bounds` asks for a plan of " << total << " int32, at most " << INT32_MAX
      << " are addressable: lower max_q_tokens, max_levels, max_fixed_chunks or max_kv_pages";
}

std::unique_ptr<BatchBackend> BatchBackend::Make(const BatchAttentionConfig& config,
                                                 const KernelHandle& kernel) {
  if (kernel.is_cuda()) return std::make_unique<CudaBatchBackend>(config, kernel);
  return std::make_unique<CpuBatchBackend>(config, kernel);
}

}  // namespace tvm_flashinfer
