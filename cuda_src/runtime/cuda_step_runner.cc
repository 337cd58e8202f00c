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
  format_.AllowReordering(int64_t{config.sliding_window ? 2 : 1} * config.max_q_tokens());
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
    const int64_t requests = int64_t{config_.sliding_window ? 2 : 1} * config_.max_batch;
    bounds.max_q_tokens = static_cast<int32_t>(
        std::min<int64_t>(bounds.max_q_tokens, requests * bounds.max_tile_tokens));
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
  const int64_t queries = in.qo_indptr[in.num_requests];  // twins are requests too
  const int64_t mean = (queries + requests - 1) / requests;
  int tile = cuda().num_tiles - 1;
  while (tile > 0 && cuda().tiles[tile - 1] >= std::max<int64_t>(1, mean) * group()) --tile;
  in.min_chunk = 64;
  tile = Compose(tile, &in);
  const std::vector<int32_t>& order = format_.token_order();
  if (!order.empty()) ReserveOrdered();
  CudaPlan* plan = PlanOf(tile, *layout);
  char* header = plan->Make(in, layout->num_blocks());
  const PlanBounds& bounds = plan->bounds();
  // A captured launch may have more tokens than the step: those have a position, and no slot.
  const auto put = [&](const auto& values, int64_t offset, auto rest, int32_t room) {
    auto* to = reinterpret_cast<decltype(rest)*>(header + offset);
    std::fill(std::copy(values.begin(), values.end(), to), to + room, rest);
  };
  put(layout->positions(), 0, int32_t{0}, HeaderTokens(bounds));
  // Layouts of parts of a step have no origins: nothing is appended by them.
  put(layout->origins(), OriginsOffset(bounds), int32_t{0}, HeaderTokens(bounds));
  put(layout->slots(), SlotsOffset(bounds), int64_t{-1}, bounds.max_q_tokens);
  std::copy(order.begin(), order.end(), reinterpret_cast<int32_t*>(header + OrderOffset(bounds)));
  next_ = plan;
  next_reorders_ = !order.empty();
}

ReadCosts CudaStepRunner::PrefixCosts(int tile) const {
  ReadCosts costs;
  costs.memory = kMemoryRows;
  costs.cached = kMemoryRows / 2;  // from L2
  costs.panel_rows = cuda().tiles[tile];
  costs.panel_cost = std::min(costs.panel_rows, cuda().tile_costs[tile]);
  costs.reordering = kMoveTokens * kMemoryRows;
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
    if (!format_.found_common()) break;  // whatever the tile
  }
  *in = flat;
  in->tile_tokens = TileTokens(best);
  if (best_gain > 0) {
    format_.Use(PrefixCosts(best));
    format_.Compose(in, TileTokens(best));
  } else {
    format_.KeepFlat();
  }
  SetTileCosts(cuda(), best, in);
  return best;
}

void CudaStepRunner::Begin(const StepLayout& layout) {
  plan_ = next_;
  num_tokens_ = layout.num_tokens();
  splits_ = layout.splits();
  num_queries_ = (splits_ ? 2 : 1) * num_tokens_;
  reorders_ = next_reorders_;
  plan_->Send(Stream());
}

Tensor CudaStepRunner::Positions() const {
  return plan_->block().CreateView({HeaderTokens(plan_->bounds())}, {kDLInt, 32, 1});
}

Tensor CudaStepRunner::Origins() const {
  return plan_->block().CreateView({HeaderTokens(plan_->bounds())}, {kDLInt, 32, 1},
                                   OriginsOffset(plan_->bounds()));
}

/*!
 * A step that changes the order of its queries launches more, and one that has them twice finds the
 * twins behind as many tokens as it has.
 */
int64_t CudaStepRunner::GraphKey() const {
  if (plan_ == nullptr) return -1;
  const int64_t key = 2 * plan_->id() + (reorders_ ? 1 : 0);
  return splits_ || reorders_ ? key * 1000003 + num_tokens_ : key * 1000003;
}

void CudaStepRunner::Append(const PoolView& pool, TokenHeads* q, TokenHeads k, TokenHeads v,
                            int32_t num_tokens) {
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
  // Padding beyond what the plan's steps can have is not even looked at.
  num_tokens = std::min(num_tokens, bounds.max_q_tokens);
  CheckCuda(cuda().append(&params, num_tokens, Stream()), "appending keys and values");
}

void CudaStepRunner::Attend(AttentionParams* params) {
  plan_->Describe(params);
  if (parts_ > 1) {
    params->num_kv_heads = parts_;
    params->k_strides.head = params->v_strides.head = 0;
  }
  reorders_ ? AttendInOrder(*params) : Run(*params);
}

void CudaStepRunner::Run(const AttentionParams& params) {
  CheckCuda(cuda().run(&params, plan_->tile_rows(), plan_->bounds().num_workers, Stream()),
            "attention");
}

void CudaStepRunner::ReserveOrdered() {
  if (ordered_q_.defined()) return;  // captured launches keep their place
  const int64_t queries = int64_t{config_.sliding_window ? 2 : 1} * config_.max_q_tokens();
  const int64_t heads = config_.num_qo_heads;
  const DLDataType type = ToDLDataType(kernel_->q_type);
  Tensor q = Tensor::Empty({queries, heads, config_.head_dim_qk}, type, device_);
  Tensor o = Tensor::Empty({queries, heads, config_.head_dim_vo}, type, device_);
  ordered_lse_ = Tensor::Empty({queries, heads}, {kDLFloat, 32, 1}, device_);
  ordered_o_ = std::move(o);
  ordered_q_ = std::move(q);
}

/*! The plan has the step's queries in another order: they follow it, outputs come back. */
void CudaStepRunner::AttendInOrder(const AttentionParams& params) {
  const int64_t bytes = ToDLDataType(kernel_->q_type).bits / 8, heads = config_.num_qo_heads;
  const int64_t qk = config_.head_dim_qk, vo = config_.head_dim_vo;
  AttentionParams ordered = params;
  ordered.q = DataOf(*ordered_q_.operator->());
  ordered.o = DataOf(*ordered_o_.operator->());
  if (params.lse != nullptr) {
    ordered.lse = static_cast<float*>(DataOf(*ordered_lse_.operator->()));
  }
  ordered.q_token_stride = heads * qk;
  ordered.q_head_stride = qk;
  ordered.o_token_stride = heads * vo;
  ordered.o_head_stride = vo;
  CudaMoveParams move{};
  move.order = reinterpret_cast<const int32_t*>(
      static_cast<const char*>(DataOf(*plan_->block().operator->())) +
      OrderOffset(plan_->bounds()));
  move.num_tokens = num_queries_;
  move.num_heads = config_.num_qo_heads;
  move.from = params.q;
  move.to = const_cast<void*>(ordered.q);
  move.from_token_bytes = params.q_token_stride * bytes;
  move.from_head_bytes = params.q_head_stride * bytes;
  move.to_token_bytes = ordered.q_token_stride * bytes;
  move.to_head_bytes = ordered.q_head_stride * bytes;
  move.head_bytes = static_cast<int32_t>(qk * bytes);
  CheckCuda(cuda().move(&move, Stream()), "queries in the order of the plan");
  Run(ordered);
  move.from = ordered.o;
  move.to = params.o;
  move.lse_from = ordered.lse;
  move.lse_to = params.lse;
  move.from_token_bytes = ordered.o_token_stride * bytes;
  move.from_head_bytes = ordered.o_head_stride * bytes;
  move.to_token_bytes = params.o_token_stride * bytes;
  move.to_head_bytes = params.o_head_stride * bytes;
  move.head_bytes = static_cast<int32_t>(vo * bytes);
  move.back = 1;
  CheckCuda(cuda().move(&move, Stream()), "outputs in the order of the batch");
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
  params.o_a_token_stride = params.o_b_token_stride = int64_t{m.num_heads} * m.dim;
  params.o_a_head_stride = params.o_b_head_stride = m.dim;
  params.num_tokens = m.num_tokens;
  params.num_heads = m.num_heads;
  params.dim = m.dim;
  CheckCuda(cuda().merge(&params, Stream()), "merging attention states");
}

void CudaStepRunner::PoisonWorkspace() {
  for (auto* plans : {&page_plans_, &token_plans_}) {
    for (const std::unique_ptr<CudaPlan>& plan : *plans) {
      if (plan != nullptr) plan->PoisonWorkspace();
    }
  }
  for (const Tensor& t : {rotated_q_, ordered_q_, ordered_o_, ordered_lse_}) {
    if (t.defined()) FillWithNaN(t);
  }
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
