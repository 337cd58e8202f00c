// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "batch_attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "check.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

using tvm::ffi::Optional;
using tvm::ffi::Tensor;

//! Lengths and positions stay below this, so that sums of two fit an int32.
constexpr int64_t kMaxPosition = int64_t{1} << 30;

void CheckLengths(ArgName arg, const IndexVector& values) {
  for (int64_t i = 0; i < values.size; ++i) {
    TVM_FLASHINFER_CHECK(values[i] >= 0 && values[i] <= kMaxPosition, ValueError)
        << "argument `" << arg << "` has " << values[i] << " at index " << i
        << ", expected a value in [0, 2^30]";
  }
}

/*! Creation bound that a section of the plan is sized by. */
const char* BoundOf(const std::string& section) {
  if (section == "kv_indices") return "max_kv_pages";
  if (section == "q_position") return "max_q_tokens";
  if (section == "kv_indptr") return "max_levels";
  if (section == "request_kv_len" || section == "kv_position") return "max_requests";
  return "max_fixed_chunks, or max_splits";
}

/*!
 * Check a level's tensors.
 * \param covers_all Whether its rows must hold every query token: the last level's do.
 * \param max_page Raised to the largest page id.
 */
LayoutLevel ReadLevel(int32_t index, const LevelTensors& tensors, int64_t page_size,
                      int64_t num_tokens, bool covers_all, int32_t* max_page) {
  const auto arg = [index](const char* name) { return ArgName{name, index}; };
  TVM_FLASHINFER_CHECK(tensors.size() == 5, ValueError)
      << "argument `levels[" << index << "]` has " << tensors.size()
      << " tensors, expected 5: qo_indptr, kv_indptr, kv_indices, last_block_len, kv_position";
  const IndexVector qo_indptr = CheckIndexVector(arg("qo_indptr"), tensors[0]);
  CheckIndptr(arg("qo_indptr"), qo_indptr);
  const int64_t rows = qo_indptr.size - 1;
  TVM_FLASHINFER_CHECK(covers_all ? qo_indptr[rows] == num_tokens : qo_indptr[rows] <= num_tokens,
                       ValueError)
      << "argument `" << arg("qo_indptr") << "` ends with " << qo_indptr[rows] << ", the batch has "
      << num_tokens << " query tokens" << (covers_all ? ", which the last level must cover" : "");
  const IndexVector kv_indptr = CheckIndexVector(arg("kv_indptr"), tensors[1], rows + 1);
  CheckIndptr(arg("kv_indptr"), kv_indptr);
  const IndexVector kv_indices = CheckIndexVector(arg("kv_indices"), tensors[2], kv_indptr[rows]);
  // Most of what a plan reads: extremes first, in a loop that vectorises, and the index on failure.
  int32_t lowest = 0;
  for (int64_t i = 0; i < kv_indices.size; ++i) {
    lowest = std::min(lowest, kv_indices[i]);
    *max_page = std::max(*max_page, kv_indices[i]);
  }
  if (lowest < 0) {
    int64_t i = 0;
    while (kv_indices[i] >= 0) ++i;
    TVM_FFI_THROW(ValueError) << "argument `" << arg("kv_indices") << "` has page " << kv_indices[i]
                              << " at index " << i
                              << ", expected a value in [0, pages of the pool)";
  }
  const IndexVector last_block_len = CheckIndexVector(arg("last_block_len"), tensors[3], rows);
  const IndexVector kv_position = CheckIndexVector(arg("kv_position"), tensors[4], rows);
  CheckLengths(arg("kv_position"), kv_position);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t pages = kv_indptr[r + 1] - kv_indptr[r];
    TVM_FLASHINFER_CHECK(last_block_len[r] >= (pages > 0 ? 1 : 0) && last_block_len[r] <= page_size,
                         ValueError)
        << "argument `" << arg("last_block_len") << "` has " << last_block_len[r] << " at index "
        << r << ", expected a value in [" << (pages > 0 ? 1 : 0) << ", page_size = " << page_size
        << "]";
    TVM_FLASHINFER_CHECK(kv_position[r] + pages * page_size <= kMaxPosition, ValueError)
        << "argument `" << arg("kv_indptr") << "` gives row " << r << " " << pages << " pages of "
        << page_size << " tokens from position " << kv_position[r]
        << ", positions must stay below 2^30";
  }
  LayoutLevel level;
  level.num_rows = static_cast<int32_t>(rows);
  level.qo_indptr = qo_indptr.data;
  level.kv_indptr = kv_indptr.data;
  level.kv_indices = kv_indices.data;
  level.last_block_len = last_block_len.data;
  level.kv_position = kv_position.data;
  return level;
}

/*! Ranges of requests, positions and heads over every element of a batch. */
ElementIndex<Interval> ElementsOf(const ScheduleInput& in, int64_t num_qo_heads,
                                  int64_t num_kv_heads) {
  Interval q{0, -1}, kv{0, -1};
  const auto cover = [](Interval* range, int64_t lo, int64_t hi) {
    if (lo > hi) return;
    *range = range->lo > range->hi ? Interval{lo, hi}
                                   : Interval{std::min(range->lo, lo), std::max(range->hi, hi)};
  };
  for (int32_t r = 0; r < in.num_requests; ++r) {
    for (int32_t t = in.qo_indptr[r]; in.q_position != nullptr && t < in.qo_indptr[r + 1]; ++t) {
      cover(&q, in.q_position[t], in.q_position[t]);
    }
    const int64_t queries = in.qo_indptr[r + 1] - in.qo_indptr[r];
    if (in.q_position == nullptr) cover(&q, in.kv_len[r] - queries, int64_t{in.kv_len[r]} - 1);
  }
  for (int32_t l = 0; l < in.num_levels; ++l) {
    const LayoutLevel& level = in.levels[l];
    for (int32_t row = 0; row < level.num_rows; ++row) {
      const int64_t pages = level.kv_indptr[row + 1] - level.kv_indptr[row];
      if (pages == 0 || level.qo_indptr[row] == level.qo_indptr[row + 1]) continue;
      const int64_t first = level.kv_position[row];
      cover(&kv, first, first + (pages - 1) * in.page_size + level.last_block_len[row] - 1);
    }
  }
  if (kv.lo > kv.hi || q.lo > q.hi) q = kv = {0, 0};  // nothing is visited
  return {
      {0, std::max(in.num_requests, 1) - 1}, q, kv, {0, num_qo_heads - 1}, {0, num_kv_heads - 1}};
}

}  // namespace

BatchAttentionObj::BatchAttentionObj(const BatchAttentionConfig& config, KernelHandle kernel)
    : config_(config),
      kernel_(std::move(kernel)),
      backend_(BatchBackend::Make(config, kernel_)),
      levels_(config.bounds.max_levels) {
  slots_.resize(config.bounds.max_q_tokens);
}

BatchAttentionObj::Planned BatchAttentionObj::ReadRequest(const PlanRequest& request,
                                                          ScheduleInput* in) {
  const PlanBounds& bounds = config_.bounds;
  Planned planned;
  planned.page_size = request.page_size;
  TVM_FLASHINFER_CHECK(request.page_size >= 1 && request.page_size <= kMaxPosition, ValueError)
      << "argument `page_size` is " << request.page_size << ", expected a value in [1, 2^30]";
  TVM_FLASHINFER_CHECK(request.fixed_chunk >= 0 && request.fixed_chunk <= kMaxPosition, ValueError)
      << "argument `fixed_chunk` is " << request.fixed_chunk << ", expected a value in [0, 2^30]";
  TVM_FLASHINFER_CHECK(request.fixed_chunk == 0 || bounds.max_fixed_chunks > 0, ValueError)
      << "argument `fixed_chunk` is " << request.fixed_chunk
      << ", but this object was created with max_fixed_chunks = 0: only 0 is accepted";

  const IndexVector qo_indptr = CheckIndexVector({"qo_indptr"}, request.qo_indptr);
  CheckIndptr({"qo_indptr"}, qo_indptr);
  const int64_t num_requests = qo_indptr.size - 1;
  planned.num_tokens = qo_indptr[num_requests];
  const IndexVector kv_len = CheckIndexVector({"kv_len"}, request.kv_len, num_requests);
  CheckLengths({"kv_len"}, kv_len);
  if (request.q_position.has_value()) {
    const IndexVector position =
        CheckIndexVector({"q_position"}, request.q_position.value(), planned.num_tokens);
    for (int64_t i = 0; i < position.size; ++i) {
      TVM_FLASHINFER_CHECK(std::abs(int64_t{position[i]}) <= kMaxPosition, ValueError)
          << "argument `q_position` has " << position[i] << " at index " << i
          << ", expected a value in [-2^30, 2^30]";
    }
    in->q_position = position.data;
  }
  const int64_t num_levels = request.levels.size();
  TVM_FLASHINFER_CHECK(num_levels >= 1 && num_levels <= bounds.max_levels, ValueError)
      << "argument `levels` has " << num_levels
      << " levels, expected a count in [1, max_levels = " << bounds.max_levels << "]";
  int64_t pages = 0;
  for (int32_t l = 0; l < num_levels; ++l) {
    levels_[l] = ReadLevel(l, request.levels[l], request.page_size, planned.num_tokens,
                           l == num_levels - 1, &planned.max_page);
    pages += levels_[l].kv_indptr[levels_[l].num_rows];
    TVM_FLASHINFER_CHECK(pages <= INT32_MAX, ValueError)
        << "argument `levels` lists " << pages << " pages, at most " << INT32_MAX
        << " are accepted";
  }
  in->num_requests = static_cast<int32_t>(num_requests);
  in->qo_indptr = qo_indptr.data;
  in->kv_len = kv_len.data;
  in->num_levels = static_cast<int32_t>(num_levels);
  in->levels = levels_.data();
  in->page_size = static_cast<int32_t>(request.page_size);
  in->causal = kernel_->causal != 0;
  in->group = config_.num_qo_heads / config_.num_kv_heads;
  in->kv_align = kernel_->kv_align;
  in->fixed_chunk = static_cast<int32_t>(request.fixed_chunk);
  planned.visited.elements = ElementsOf(*in, config_.num_qo_heads, config_.num_kv_heads);
  planned.visited.q_rows = {0, std::max<int64_t>(planned.num_tokens, 1) - 1};
  planned.visited.kv_slots = {0, (int64_t{planned.max_page} + 1) * planned.page_size - 1};
  planned.visited.kv_slots.hi = std::max<int64_t>(planned.visited.kv_slots.hi, 0);
  return planned;
}

void BatchAttentionObj::Plan(const PlanRequest& request) {
  ScheduleInput in;
  const Planned planned = ReadRequest(request, &in);
  try {
    backend_->Plan(&in, request.per_worker_queues);
  } catch (const PlanOverflow& overflow) {
    TVM_FFI_THROW(ValueError) << overflow.what() << ": create the BatchAttention with a larger "
                              << BoundOf(overflow.section());
  }
  planned_ = planned;
  ++plan_count_;
}

BatchAttentionObj::Pools BatchAttentionObj::CheckPools(const PoolTensors& pool) const {
  const ElementType type = kernel_->kv_type;
  const int32_t heads = config_.num_kv_heads;
  if (!pool.v.has_value()) {
    TVM_FLASHINFER_CHECK(config_.head_dim_qk == config_.head_dim_vo, ValueError)
        << "argument `v` is missing: keys and values share a tensor only where head_dim_qk, "
        << config_.head_dim_qk << ", equals head_dim_vo, " << config_.head_dim_vo;
    return {CheckPool({"k"}, pool.k, type, config_.order, PoolPart::kKeysOfBoth, heads,
                      config_.head_dim_qk, config_.device),
            CheckPool({"k"}, pool.k, type, config_.order, PoolPart::kValuesOfBoth, heads,
                      config_.head_dim_vo, config_.device)};
  }
  const Pools pools{CheckPool({"k"}, pool.k, type, config_.order, PoolPart::kAlone, heads,
                              config_.head_dim_qk, config_.device),
                    CheckPool({"v"}, pool.v.value(), type, config_.order, PoolPart::kAlone, heads,
                              config_.head_dim_vo, config_.device)};
  TVM_FLASHINFER_CHECK(pools.k.num_pages == pools.v.num_pages, ValueError)
      << "argument `v` has " << pools.v.num_pages << " pages, argument `k` has "
      << pools.k.num_pages << ": they go together";
  TVM_FLASHINFER_CHECK(pools.k.page_size == pools.v.page_size, ValueError)
      << "argument `v` has pages of " << pools.v.page_size << " tokens, argument `k` of "
      << pools.k.page_size << ": they go together";
  return pools;
}

void BatchAttentionObj::Run(const TensorView& q, const PoolTensors& pool, double sm_scale,
                            const TensorView& o, const Optional<TensorView>& lse) {
  TVM_FLASHINFER_CHECK(planned_.num_tokens >= 0, RuntimeError)
      << "nothing is planned: call plan before run";
  const int64_t tokens = planned_.num_tokens;
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const TokenView q_view = CheckTokens({"q"}, q, type, tokens, config_.num_qo_heads,
                                       config_.head_dim_qk, false, config_.device);
  const Pools pools = CheckPools(pool);
  if (planned_.max_page >= 0) {
    TVM_FLASHINFER_CHECK(pools.k.page_size == planned_.page_size, ValueError)
        << "argument `k` has pages of " << pools.k.page_size << " tokens, the plan was made for "
        << "page_size = " << planned_.page_size;
    TVM_FLASHINFER_CHECK(planned_.max_page < pools.k.num_pages, ValueError)
        << "argument `k` has " << pools.k.num_pages << " pages, the plan's kv_indices name page "
        << planned_.max_page;
  }
  TVM_FLASHINFER_CHECK(std::isfinite(static_cast<float>(sm_scale)), ValueError)
      << "argument `sm_scale` is " << sm_scale << ", expected a finite float32";
  const TokenView o_view = CheckTokens({"out"}, o, type, tokens, config_.num_qo_heads,
                                       config_.head_dim_vo, true, config_.device);
  AttentionParams params{};
  params.variant_params = variant_args_.Get(*kernel_, planned_.visited, plan_count_);
  if (lse.has_value()) {
    TVM_FLASHINFER_CHECK(kernel_->softmax != 0, ValueError)
        << "argument `lse`: the variant has no softmax, and so no log-sum-exp";
    params.lse = CheckLse({"lse"}, lse.value(), tokens, config_.num_qo_heads, config_.device);
  }
  params.q = q_view.data;
  params.k = pools.k.data;
  params.v = pools.v.data;
  params.o = o_view.data;
  params.q_token_stride = q_view.token_stride;
  params.q_head_stride = q_view.head_stride;
  params.o_token_stride = o_view.token_stride;
  params.o_head_stride = o_view.head_stride;
  params.k_strides = pools.k.strides;
  params.v_strides = pools.v.strides;
  params.page_size = static_cast<int32_t>(planned_.page_size);
  params.num_qo_heads = config_.num_qo_heads;
  params.num_kv_heads = config_.num_kv_heads;
  params.sm_scale = static_cast<float>(sm_scale);
  backend_->Run(&params);
}

void BatchAttentionObj::Append(const TensorView& k_new, const TensorView& v_new,
                               const TensorView& slots, const PoolTensors& pool,
                               const Optional<TensorView>& positions) {
  const IndexVector slot = CheckIndexVector({"slots"}, slots);
  const int64_t tokens = slot.size;
  TVM_FLASHINFER_CHECK(tokens <= static_cast<int64_t>(slots_.size()), ValueError)
      << "argument `slots` has " << tokens << " entries, this object was created with "
      << "max_q_tokens = " << slots_.size();
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const int32_t heads = config_.num_kv_heads;
  const TokenView k_view = CheckTokens({"k_new"}, k_new, type, tokens, heads, config_.head_dim_qk,
                                       false, config_.device);
  const TokenView v_view = CheckTokens({"v_new"}, v_new, type, tokens, heads, config_.head_dim_vo,
                                       false, config_.device);
  const Pools pools = CheckPools(pool);
  const int64_t places = pools.k.num_pages * pools.k.page_size;
  for (int64_t i = 0; i < tokens; ++i) {
    TVM_FLASHINFER_CHECK(slot[i] >= -1 && slot[i] < places, ValueError)
        << "argument `slots` has " << slot[i] << " at index " << i << ", the pool has " << places
        << " places; -1 drops a token";
    slots_[i] = slot[i];
  }
  const VariantArgs* args = nullptr;
  const int32_t* position = nullptr;
  if (kernel_->stores) {
    args = CheckStore(tokens, positions, places, &position);
  }
  backend_->Append({k_view, v_view, pools.k, pools.v, static_cast<int32_t>(tokens), slots_.data(),
                    position, args});
}

const VariantArgs* BatchAttentionObj::CheckStore(int64_t tokens,
                                                 const Optional<TensorView>& positions,
                                                 int64_t places, const int32_t** position) {
  Interval at{0, 0};
  if (positions.has_value()) {
    const IndexVector given = CheckIndexVector({"positions"}, positions.value(), tokens);
    CheckLengths({"positions"}, given);
    for (int64_t i = 0; i < tokens; ++i) at.hi = std::max<int64_t>(at.hi, given[i]);
    *position = given.data;
  }
  VisitedRange range{};
  range.elements.kv_idx = at;
  range.elements.q_head = range.elements.q_idx = range.elements.request = {0, 0};
  range.elements.kv_head = {0, config_.num_kv_heads - 1};
  range.q_rows = {0, 0};
  range.kv_slots = {0, std::max<int64_t>(places, 1) - 1};
  range.stores = true;
  return variant_args_.Get(*kernel_, range, -1);
}

Tensor BatchAttentionObj::Section(const std::string& name) const {
  const PlanLayout& layout = backend_->layout();
  for (int32_t i = 0; i < PlanLayout::kNumSections; ++i) {
    const auto section = static_cast<PlanSection>(i);
    if (name != PlanSectionName(section)) continue;
    const auto copy =
        tvm::runtime::Tensor::Empty({layout.Size(section)}, {kDLInt, 32, 1}, {kDLCPU, 0});
    std::copy_n(backend_->plan() + layout.Offset(section), layout.Size(section),
                static_cast<int32_t*>(copy->data));
    return copy;
  }
  TVM_FFI_THROW(ValueError) << "argument `name` is \"" << name
                            << "\", expected a section of the plan, see plan.h";
  __builtin_unreachable();
}

}  // namespace tvm_flashinfer
