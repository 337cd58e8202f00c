// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "graph_plan.h"

#include <algorithm>
#include <utility>

#include "check.h"
#include "cpu_executor.h"
#include "cuda_plan.h"
#include "step_plan.h"

namespace tvm_flashinfer {

GraphBatch::GraphBatch(const GraphExtents& extents, const KernelHandle& kernel) {
  const auto batch = static_cast<int32_t>(extents.batch);
  const auto queries = static_cast<int32_t>(extents.num_queries);
  const auto keys = static_cast<int32_t>(extents.num_keys);
  qo_indptr_.resize(batch + 1);
  kv_indptr_.resize(batch + 1);
  pages_.resize(batch);
  kv_len_.assign(batch, keys);
  kv_position_.assign(batch, 0);
  q_position_.resize(size_t{1} * batch * queries);
  for (int32_t b = 0; b < batch; ++b) {  // all keys of a request are a page
    qo_indptr_[b + 1] = (b + 1) * queries;
    kv_indptr_[b + 1] = keys > 0 ? b + 1 : 0;
    pages_[b] = b;
    for (int32_t i = 0; i < queries; ++i) {
      q_position_[b * queries + i] = static_cast<int32_t>(extents.q_begin) + i;
    }
  }
  level_.num_rows = batch;
  level_.qo_indptr = qo_indptr_.data();
  level_.kv_indptr = kv_indptr_.data();
  level_.kv_indices = pages_.data();
  level_.last_block_len = kv_len_.data();
  level_.kv_position = kv_position_.data();
  input_.num_requests = batch;
  input_.qo_indptr = qo_indptr_.data();
  input_.kv_len = kv_len_.data();
  input_.levels = &level_;
  input_.page_size = std::max(keys, 1);
  input_.q_position = q_position_.data();
  input_.causal = kernel->causal != 0;
  input_.group = static_cast<int32_t>(extents.num_qo_heads / extents.num_kv_heads);
  input_.kv_align = kernel->kv_align;
}

PlanBounds GraphPlan::Bounds(const GraphExtents& e) {
  PlanBounds b;
  b.max_requests = static_cast<int32_t>(e.batch);
  b.max_q_tokens = static_cast<int32_t>(e.batch * e.num_queries);
  b.max_kv_pages = static_cast<int32_t>(e.batch);
  b.num_kv_heads = static_cast<int32_t>(e.num_kv_heads);
  return b;
}

void GraphPlan::CheckBounds(const PlanBounds& bounds, const GraphExtents& e) {
  TVM_FLASHINFER_CHECK(PlanLayout::Make(bounds).total <= INT32_MAX, ValueError)
      << "argument `spec` has " << e.batch << " requests of " << e.num_queries << " queries and "
      << e.num_kv_heads << " KV heads: a plan of more than 2^31 entries";
}

VisitedRange GraphPlan::Visited() const {
  const GraphExtents& e = extents_;
  const int64_t keys = std::max<int64_t>(e.num_keys, 1);
  return {{{0, e.batch - 1},
           {e.q_begin, e.q_begin + e.num_queries - 1},
           {0, keys - 1},
           {0, e.num_qo_heads - 1},
           {0, e.num_kv_heads - 1}},
          {0, e.batch * e.num_queries - 1},
          {0, e.batch * keys - 1}};
}

void GraphPlan::Run(const GraphOperand& q, const GraphOperand& k, const GraphOperand& v,
                    const GraphOperand& o, double sm_scale) {
  AttentionParams params{};
  params.variant_params = variant_args_.Get(*kernel_, Visited(), -1);
  params.k = k.data;
  params.v = v.data;
  params.k_strides = {k.batch, k.head, k.token};
  params.v_strides = {v.batch, v.head, v.token};
  params.q_token_stride = q.token;
  params.q_head_stride = q.head;
  params.o_token_stride = o.token;
  params.o_head_stride = o.head;
  params.page_size = static_cast<int32_t>(std::max<int64_t>(extents_.num_keys, 1));
  params.num_qo_heads = static_cast<int32_t>(extents_.num_qo_heads);
  params.num_kv_heads = static_cast<int32_t>(extents_.num_kv_heads);
  params.sm_scale = static_cast<float>(sm_scale);
  Launch(&params, q, o);
}

namespace {

class CpuGraphPlan final : public GraphPlan {
 public:
  CpuGraphPlan(KernelHandle kernel, const GraphExtents& extents)
      : GraphPlan(std::move(kernel), extents, {kDLCPU, 0}),
        plan_(TileBounds(), static_cast<int32_t>(extents.num_qo_heads), kernel_->head_dim_vo),
        executor_(kernel_, std::max<int32_t>(kernel_->row_tiles[1], group())),
        by_request_(extents.batch) {
    const GraphBatch batch(extents, kernel_);
    ScheduleInput in = batch.input();
    in.tile_tokens = plan_.bounds().max_tile_tokens;
    in.shared_queue = true;
    plan_.Make(in);
  }

 private:
  PlanBounds TileBounds() const {
    PlanBounds b = Bounds(extents_);
    b.max_tile_tokens = std::max(1, kernel_->row_tiles[1] / group());
    b = CpuExecutor::Bounds(b, kernel_.cpu(), group());
    CheckBounds(b, extents_);
    return b;
  }

  void Launch(AttentionParams* params, const GraphOperand& q, const GraphOperand& o) final {
    plan_.Describe(params);
    // Tokens are numbered through the batch, in which queries need not lie evenly: every request
    // gets a base that its first token's number leads to its own rows.
    const int64_t bytes = kernel_->q_type == ElementType::kFloat32 ? 4 : 2;
    for (int64_t b = 0; b < extents_.batch; ++b) {
      const int64_t first = b * extents_.num_queries;
      by_request_[b] = *params;
      by_request_[b].q = q.data + (b * q.batch - first * q.token) * bytes;
      by_request_[b].o = o.data + (b * o.batch - first * o.token) * bytes;
    }
    executor_.RunRequests(by_request_.data(), static_cast<int32_t>(extents_.batch),
                          static_cast<int32_t>(extents_.num_queries));
  }

  StepPlan plan_;
  CpuExecutor executor_;
  std::vector<AttentionParams> by_request_;
};

/*! The plan is on the GPU from its making on: a run is a launch, and nothing but. */
class CudaGraphPlan final : public GraphPlan {
 public:
  CudaGraphPlan(KernelHandle kernel, const GraphExtents& extents, DLDevice device)
      : GraphPlan(std::move(kernel), extents, device),
        parts_(HeadParts(cuda(), static_cast<int32_t>(extents.num_qo_heads),
                         static_cast<int32_t>(extents.num_kv_heads))) {
    const GraphBatch batch(extents, kernel_);
    ScheduleInput in = batch.input();
    in.group = group() / parts_;
    const int32_t rows = cuda().tiles[ChooseTile(cuda(), in)];
    in.tile_tokens = std::max(1, rows / in.group);
    in.min_chunk = 64;
    PlanBounds bounds = Bounds(extents);
    bounds.num_kv_heads *= parts_;
    bounds.max_tile_tokens = in.tile_tokens;
    bounds.max_splits = 8;
    bounds.num_workers = 0;  // as many as are resident
    CheckBounds(bounds, extents);
    plan_ = std::make_unique<CudaPlan>(cuda(), bounds, rows,
                                       static_cast<int32_t>(extents.num_qo_heads), 0, device);
    plan_->Make(in, extents.batch);
    plan_->Send(CurrentStream(device));
    plan_->Wait();  // later runs may be on other streams
  }

 private:
  const CudaKernel& cuda() const { return kernel_.cuda(); }

  void Launch(AttentionParams* params, const GraphOperand& q, const GraphOperand& o) final {
    const auto check = [&](const char* name, const GraphOperand& x) {
      TVM_FLASHINFER_CHECK(extents_.batch == 1 || x.batch == extents_.num_queries * x.token,
                           ValueError)
          << "argument `spec`: requests of argument `" << name << "` lie " << x.batch
          << " elements apart, a CUDA kernel takes " << extents_.num_queries * x.token
          << ", their queries one after another";
    };
    check("q", q);
    check("o", o);
    plan_->Describe(params);
    params->q = q.data;
    params->o = o.data;
    if (parts_ > 1) {
      params->num_kv_heads = parts_;
      params->k_strides.head = params->v_strides.head = 0;
    }
    void* stream = CurrentStream(device_);
    if (!captured_) {
      int32_t capturing = 0;
      CheckCuda(cuda().is_capturing(stream, &capturing), "asking whether a graph is captured");
      captured_ = capturing != 0;
    }
    CheckCuda(cuda().run(params, plan_->tile_rows(), plan_->bounds().num_workers, stream),
              "attention on a CUDA device");
  }

  int32_t parts_;  //!< see HeadParts
  std::unique_ptr<CudaPlan> plan_;
};

}  // namespace

std::unique_ptr<GraphPlan> GraphPlan::Make(const tvm::ffi::Function& factory,
                                           const GraphExtents& extents, DLDevice device) {
  KernelHandle kernel(factory);
  TVM_FLASHINFER_CHECK(kernel.device_type() == device.device_type, ValueError)
      << "argument `kernel` was compiled for device type " << static_cast<int>(kernel.device_type())
      << ", argument `q` is on " << static_cast<int>(device.device_type);
  if (kernel.is_cuda()) {
    return std::make_unique<CudaGraphPlan>(std::move(kernel), extents, device);
  }
  return std::make_unique<CpuGraphPlan>(std::move(kernel), extents);
}

}  // namespace tvm_flashinfer
