// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "cpu_step_runner.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cuda_step_runner.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::runtime::Tensor;

std::unique_ptr<StepRunner> StepRunner::Make(const KVCacheConfig& config, KernelHandle kernel,
                                             DLDevice device, std::optional<RopeConfig> rope) {
  if (kernel.is_cuda()) {
    return std::make_unique<CudaStepRunner>(config, std::move(kernel), device, std::move(rope));
  }
  return std::make_unique<CpuStepRunner>(config, std::move(kernel), std::move(rope));
}

/*!
 * Measured on AVX-512 cores over float32: a KV token of one head takes as long from memory as the
 * arithmetic of 16 rows, from L3 of 4. A tile of few rows computes just these, a larger one whole
 * panels of 32, with 0.7 of the time a row.
 */
ReadCosts CpuStepRunner::PrefixCosts() const {
  ReadCosts costs;
  const int32_t bytes = ToDLDataType(kernel_->kv_type).bits / 8;
  costs.memory = 4 * bytes;
  costs.cached = bytes;
  costs.small_rows = kernel_->row_tiles[0];
  costs.panel_rows = 32;
  costs.panel_cost = 23;
  return costs;
}

CpuStepRunner::CpuStepRunner(const KVCacheConfig& config, KernelHandle kernel,
                             std::optional<RopeConfig> rope)
    : StepRunner(config, kernel),
      executor_(kernel, std::max(kernel->row_tiles[1], config.num_qo_heads / config.num_kv_heads)),
      page_plan_(CpuExecutor::Bounds(PageBounds(), kernel_.cpu(), group()), config.num_qo_heads,
                 config.head_dim_vo) {
  const DLDevice cpu{kDLCPU, 0};
  const int32_t max_tokens = config.max_q_tokens();
  const int64_t max_queries = config.sliding_window ? 2 * int64_t{max_tokens} : max_tokens;
  format_.AllowReordering(max_queries);
  format_.Use(PrefixCosts());
  // Not initialised: its memory is there once a step is reordered.
  const int64_t row_bytes =
      (config.head_dim_qk + config.head_dim_vo) * int64_t{ToDLDataType(kernel->q_type).bits / 8};
  ordered_.reset(new char[max_queries * config.num_qo_heads * row_bytes]);
  ordered_lse_.reset(new float[max_queries * config.num_qo_heads]);
  positions_ = Tensor::Empty({max_tokens}, {kDLInt, 32, 1}, cpu);
  origins_ = Tensor::Empty({max_tokens}, {kDLInt, 32, 1}, cpu);
  if (rope.has_value()) {
    const DLDataType type = ToDLDataType(kernel->q_type);
    const int64_t dim = config.head_dim_qk;
    const int64_t queries = config.sliding_window ? 2 * max_tokens : max_tokens;
    rotated_q_ = Tensor::Empty({queries, config.num_qo_heads, dim}, type, cpu);
    rotated_k_ = Tensor::Empty({max_tokens, config.num_kv_heads, dim}, type, cpu);
    if (config.sliding_window) twin_rope_.emplace(*rope, max_tokens);
    rope_.emplace(*std::move(rope), max_tokens);
  }
}

void CpuStepRunner::Plan(StepLayout* layout) {
  if (layout->by_token()) {
    const int64_t blocks = layout->num_blocks();
    if (token_plan_ == nullptr || token_plan_->bounds().max_kv_pages < blocks) {
      token_plan_ = std::make_unique<StepPlan>(
          CpuExecutor::Bounds(TokenBounds(blocks), kernel_.cpu(), group()), config_.num_qo_heads,
          config_.head_dim_vo);
    }
  }
  StepPlan* plan = layout->by_token() ? token_plan_.get() : &page_plan_;
  ScheduleInput in = Describe(layout);
  in.tile_tokens =
      ChooseTileTokens(layout->num_tokens(), in.num_requests, in.group, kernel_->row_tiles, 2);
  in.shared_queue = true;
  // The kernel goes by the rows that an item really has: rows of one request don't mind the tile.
  format_.Compose(&in, plan->bounds().max_tile_tokens);
  plan->Make(in);
  plan_ = plan;
}

void CpuStepRunner::Begin(const StepLayout& layout) {
  layout_ = &layout;
  std::copy(layout.positions().begin(), layout.positions().end(),
            static_cast<int32_t*>(DataOf(*positions_.operator->())));
  std::copy(layout.origins().begin(), layout.origins().end(),
            static_cast<int32_t*>(DataOf(*origins_.operator->())));
  if (rope_.has_value()) rope_->Prepare(layout.origins().data(), layout.num_tokens());
  if (rope_.has_value() && layout.splits()) {
    twin_rope_->Prepare(layout.positions().data(), layout.num_tokens());
  }
}

void CpuStepRunner::Append(const PoolView& pool, TokenHeads* q, TokenHeads k, TokenHeads v,
                           int32_t) {
  if (rope_.has_value()) {
    const int64_t dim = config_.head_dim_qk;
    const auto rotate = [&](TokenHeads* operand, const Tensor& to, int32_t heads) {
      const TokenHeads rotated{DataOf(*to.operator->()), heads * dim, dim};
      rope_->Rotate(kernel_->q_type, *operand, rotated, heads, config_.head_dim_qk);
      *operand = rotated;
    };
    if (layout_->splits()) {
      TokenHeads twins{DataOf(*rotated_q_.operator->()), config_.num_qo_heads * dim, dim};
      twins.data = static_cast<char*>(twins.data) +
                   layout_->num_tokens() * twins.token_stride * rotated_q_->dtype.bits / 8;
      twin_rope_->Rotate(kernel_->q_type, *q, twins, config_.num_qo_heads, config_.head_dim_qk);
    }
    rotate(q, rotated_q_, config_.num_qo_heads);
    if (rotates_keys_) rotate(&k, rotated_k_, config_.num_kv_heads);
  }
  const auto append = [&](TokenHeads source, char* to, const KVStrides& strides, bool values) {
    AppendParams params{};
    params.source = source.data;
    params.source_token_stride = source.token_stride;
    params.source_head_stride = source.head_stride;
    params.pool = to;
    params.strides = strides;
    params.slots = layout_->slots().data();
    params.page_size = config_.page_size;
    params.num_heads = config_.num_kv_heads;
    params.positions = layout_->positions().data();
    params.variant_params = &variant_args_;
    params.values = values;
    executor_.Append(params, layout_->num_tokens());
  };
  append(k, pool.k, pool.k_strides, false);
  if (!config_.mla) append(v, pool.v, pool.v_strides, true);
}

void CpuStepRunner::Attend(AttentionParams* params) {
  plan_->Describe(params);
  if (format_.token_order().empty()) {
    executor_.Run(*params);
  } else {
    AttendInOrder(*params, format_.token_order());
  }
}

/*! The plan has the step's tokens in another order: queries follow it, outputs come back. */
void CpuStepRunner::AttendInOrder(const AttentionParams& params,
                                  const std::vector<int32_t>& order) {
  const int64_t bytes = ToDLDataType(kernel_->q_type).bits / 8, heads = config_.num_qo_heads;
  const int64_t qk = config_.head_dim_qk, vo = config_.head_dim_vo;
  const auto tokens = static_cast<int64_t>(order.size());
  char* q = ordered_.get();
  char* o = q + tokens * heads * qk * bytes;
  AttentionParams ordered = params;
  ordered.q = q;
  ordered.o = o;
  if (params.lse != nullptr) ordered.lse = ordered_lse_.get();
  ordered.q_token_stride = heads * qk;
  ordered.o_token_stride = heads * vo;
  ordered.q_head_stride = qk;
  ordered.o_head_stride = vo;
  const auto row = [&](const void* base, int64_t token, int64_t token_stride, int64_t head,
                       int64_t head_stride) {
    return static_cast<const char*>(base) + (token * token_stride + head * head_stride) * bytes;
  };
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h, q += qk * bytes) {
      std::memcpy(q, row(params.q, order[t], params.q_token_stride, h, params.q_head_stride),
                  qk * bytes);
    }
  }
  executor_.Run(ordered);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h, o += vo * bytes) {
      const char* to = row(params.o, order[t], params.o_token_stride, h, params.o_head_stride);
      std::memcpy(const_cast<char*>(to), o, vo * bytes);
    }
    if (params.lse != nullptr) {
      std::copy_n(ordered.lse + t * heads, heads, params.lse + order[t] * heads);
    }
  }
}

void CpuStepRunner::Copy(void* to, const void* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void CpuStepRunner::Merge(const MergeOperands& m) {
  static const tvm::ffi::Function merge =
      tvm::ffi::Function::GetGlobalRequired("tvm_flashinfer.merge_states");
  int64_t shape[] = {m.num_tokens, m.num_heads, m.dim};
  int64_t dense[] = {int64_t{m.num_heads} * m.dim, m.dim, 1}, rows[] = {m.num_heads, 1};
  int64_t strided[] = {m.o.token_stride, m.o.head_stride, 1};
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const auto output = [&](const void* data, int64_t* strides) {
    return DLTensor{const_cast<void*>(data), {kDLCPU, 0}, 3, type, shape, strides, 0};
  };
  const auto lse = [&](const float* data) {
    return DLTensor{const_cast<float*>(data), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, shape, rows, 0};
  };
  DLTensor o_a = output(m.o_a, dense), o_b = output(m.o_b, dense), o = output(m.o.data, strided);
  DLTensor lse_a = lse(m.lse_a), lse_b = lse(m.lse_b), lse_o = lse(m.lse);
  merge(&o_a, &lse_a, &o_b, &lse_b, &o, &lse_o);
}

}  // namespace tvm_flashinfer
