// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "cuda_step_runner.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "check.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::runtime::Tensor;

CudaStepRunner::CudaStepRunner(const KVCacheConfig& config, KernelHandle kernel, DLDevice device,
                               std::optional<RopeConfig> rope)
    : StepRunner(config, std::move(kernel)),
      device_(device),
      parts_(HeadParts(cuda(), config.num_qo_heads, config.num_kv_heads)),
      rope_(std::move(rope)) {
  if (rope_.has_value()) {
    const std::vector<float>& f = rope_->frequencies;
    frequencies_ = Tensor::Empty({static_cast<int64_t>(f.size())}, {kDLFloat, 32, 1}, device);
    frequencies_.CopyFromBytes(f.data(), f.size() * sizeof(float));
    const int64_t queries = int64_t{config.sliding_window ? 2 : 1} * config.max_q_tokens();
    rotated_q_ = Tensor::Empty({queries, config.num_qo_heads, config.head_dim_qk},
                               ToDLDataType(kernel_->q_type), device);
  }
}

/*! A tile is taken by steps of few enough tokens a request, so all but the last are small. */
PlanBounds CudaStepRunner::TileBounds(PlanBounds bounds, int32_t tile_rows, bool last) const {
  bounds.max_tile_tokens = std::max(1, tile_rows / group());
  bounds.num_kv_heads *= parts_;
  if (!last) {
    bounds.max_q_tokens = static_cast<int32_t>(std::min<int64_t>(
        bounds.max_q_tokens, int64_t{config_.max_batch} * bounds.max_tile_tokens));
    bounds.max_prefix_q_tokens = std::min(bounds.max_prefix_q_tokens, bounds.max_q_tokens);
  }
  bounds.max_splits = 8;
  bounds.num_workers = 0;  // as many as are resident
  return bounds;
}

CudaPlan* CudaStepRunner::PlanOf(int tile, const StepLayout& layout) {
  const bool by_token = layout.by_token();
  std::unique_ptr<CudaPlan>& plan = (by_token ? token_plans_ : page_plans_)[tile];
  const int64_t blocks = layout.num_blocks();
  if (plan == nullptr || (by_token && plan->bounds().max_kv_pages < blocks)) {
    const int32_t rows = cuda().tiles[tile];
    const PlanBounds bounds = TileBounds(by_token ? TokenBounds(blocks) : PageBounds(), rows,
                                         tile + 1 == cuda().num_tiles);
    auto made = std::make_unique<CudaPlan>(cuda(), bounds, rows, config_.num_qo_heads,
                                           HeaderBytes(bounds), device_);
    if (plan_ == plan.get()) plan_ = nullptr;
    plan = std::move(made);
  }
  return plan.get();
}

void CudaStepRunner::Plan(StepLayout* layout) {
  ScheduleInput in = Describe(layout);
  in.group = group();
  const int64_t requests = std::max(1, in.num_requests);
  const int64_t mean = (layout->num_tokens() + requests - 1) / requests;
  int tile = cuda().num_tiles - 1;
  while (tile > 0 && cuda().tiles[tile - 1] >= std::max<int64_t>(1, mean) * group()) --tile;
  in.min_chunk = 64;
  tile = Compose(tile, &in);
  CudaPlan* plan = PlanOf(tile, *layout);
  char* header = plan->Make(in, layout->num_blocks());
  const PlanBounds& bounds = plan->bounds();
  std::copy(layout->positions().begin(), layout->positions().end(),
            reinterpret_cast<int32_t*>(header));
  // Layouts of parts of a step have no origins: nothing is appended by them.
  std::copy(layout->origins().begin(), layout->origins().end(),
            reinterpret_cast<int32_t*>(header + OriginsOffset(bounds)));
  std::copy(layout->slots().begin(), layout->slots().end(),
            reinterpret_cast<int64_t*>(header + SlotsOffset(bounds)));
  next_ = plan;
}

ReadCosts CudaStepRunner::PrefixCosts(int tile) const {
  ReadCosts costs;
  costs.memory = kMemoryRows;
  costs.cached = kMemoryRows / 2;  // from L2
  costs.panel_rows = costs.panel_cost = cuda().tiles[tile];
  return costs;
}

/*! One tile serves the whole launch: a larger one reads a prefix for more queries at a time. */
int CudaStepRunner::Compose(int tile, ScheduleInput* in) {
  const ScheduleInput flat = *in;
  int64_t best_gain = 0;
  int best = tile;
  for (int t = tile; t < cuda().num_tiles; ++t) {
    *in = flat;
    format_.Use(PrefixCosts(t));
    if (format_.Compose(in, TileTokens(t)) > 0 && format_.gain() > best_gain) {
      best_gain = format_.gain();
      best = t;
    }
  }
  *in = flat;
  in->tile_tokens = TileTokens(best);
  if (best_gain > 0) {
    in->compute_rows = kMemoryRows;
    format_.Use(PrefixCosts(best));
    format_.Compose(in, TileTokens(best));
  }
  return best;
}

void CudaStepRunner::Begin(const StepLayout& layout) {
  plan_ = next_;
  num_tokens_ = layout.num_tokens();
  splits_ = layout.splits();
  plan_->Send(Stream());
}

Tensor CudaStepRunner::Positions() const {
  return plan_->block().CreateView({plan_->bounds().max_q_tokens}, {kDLInt, 32, 1});
}

Tensor CudaStepRunner::Origins() const {
  return plan_->block().CreateView({plan_->bounds().max_q_tokens}, {kDLInt, 32, 1},
                                   OriginsOffset(plan_->bounds()));
}

void CudaStepRunner::Append(const PoolView& pool, TokenHeads* q, TokenHeads k, TokenHeads v) {
  CudaAppendParams params{};
  params.q = q->data;
  params.q_token_stride = q->token_stride;
  params.q_head_stride = q->head_stride;
  params.k = k.data;
  params.k_token_stride = k.token_stride;
  params.k_head_stride = k.head_stride;
  params.v = v.data;
  params.v_token_stride = v.token_stride;
  params.v_head_stride = v.head_stride;
  params.k_pool = pool.k;
  params.v_pool = config_.mla ? nullptr : pool.v;
  params.k_strides = pool.k_strides;
  params.v_strides = pool.v_strides;
  const auto* header = static_cast<const char*>(DataOf(*plan_->block().operator->()));
  const PlanBounds& bounds = plan_->bounds();
  params.positions = reinterpret_cast<const int32_t*>(header);
  params.origins = reinterpret_cast<const int32_t*>(header + OriginsOffset(bounds));
  params.slots = reinterpret_cast<const int64_t*>(header + SlotsOffset(bounds));
  params.variant_params = &variant_args_;
  params.num_qo_heads = config_.num_qo_heads;
  params.num_kv_heads = config_.num_kv_heads;
  params.page_size = config_.page_size;
  if (rope_.has_value()) {
    params.rotated_q = DataOf(*rotated_q_.operator->());
    params.frequencies = static_cast<const float*>(DataOf(*frequencies_.operator->()));
    params.magnitude = rope_->magnitude;
    params.rotary_dim = rope_->rotary_dim();
    params.interleaved = rope_->interleaved ? 1 : 0;
    const int64_t dim = config_.head_dim_qk;
    if (splits_) {
      params.twin_q = static_cast<char*>(params.rotated_q) +
                      num_tokens_ * config_.num_qo_heads * dim * rotated_q_->dtype.bits / 8;
    }
    *q = {params.rotated_q, config_.num_qo_heads * dim, dim};
  }
  CheckCuda(cuda().append(&params, num_tokens_, Stream()), "appending keys and values");
}

void CudaStepRunner::Attend(AttentionParams* params) {
  plan_->Describe(params);
  if (parts_ > 1) {
    params->num_kv_heads = parts_;
    params->k_strides.head = params->v_strides.head = 0;
  }
  CheckCuda(cuda().run(params, plan_->tile_rows(), plan_->bounds().num_workers, Stream()),
            "attention");
}

void CudaStepRunner::Copy(void* to, const void* from, int64_t bytes) {
  CheckCuda(cuda().copy(to, from, bytes, Stream()), "copying keys and values");
}

void CudaStepRunner::Merge(const MergeOperands& m) {
  CudaMergeParams params{};
  params.o_a = m.o_a;
  params.lse_a = m.lse_a;
  params.o_b = m.o_b;
  params.lse_b = m.lse_b;
  params.o = m.o.data;
  params.lse = m.lse;
  params.o_token_stride = m.o.token_stride;
  params.o_head_stride = m.o.head_stride;
  params.num_tokens = m.num_tokens;
  params.num_heads = m.num_heads;
  params.dim = m.dim;
  CheckCuda(cuda().merge(&params, Stream()), "merging attention states");
}

void CudaStepRunner::Wait() {
  void* event = nullptr;
  CheckCuda(cuda().event_create(&event), "creating a CUDA event");
  const char* error = cuda().event_record(event, Stream());
  if (error == nullptr) error = cuda().event_wait(event);
  cuda().event_destroy(event);
  CheckCuda(error, "waiting for the GPU");
}

}  // namespace tvm_flashinfer
