// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Creation of the KV cache, its sequences, and the steps that append to them.
#include "kv_cache.h"

#include <algorithm>
#include <utility>

#include "check.h"
#include "huge_pages.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::ffi::Optional;

/*! Distance of pages over distance of tokens, which is the same of keys and of values. */
static int64_t PageStride(const KVCacheConfig& config) {
  const bool beside = !config.mla && config.head_dim_qk == config.head_dim_vo;
  return int64_t{beside ? 2 : 1} * config.num_kv_heads * config.page_size;
}

KVCacheObj::KVCacheObj(const KVCacheConfig& config, KernelHandle kernel, DLDataType dtype,
                       DLDevice device, std::optional<RopeConfig> rope)
    : config_(config),
      kernel_(kernel),
      dtype_(dtype),
      device_(device),
      element_bytes_(dtype.bits / 8),
      rotates_(rope.has_value()),
      k_page_(int64_t{config.num_kv_heads} * config.page_size * config.head_dim_qk),
      v_page_(config.mla ? 0
                         : int64_t{config.num_kv_heads} * config.page_size * config.head_dim_vo),
      pages_(config.num_pages(), config.page_size),
      rope_config_(rope),
      layout_(config.page_size, PageStride(config)),
      past_layout_(config.page_size, PageStride(config)),
      own_layout_(1, 1),
      masked_layout_(config.page_size, PageStride(config)),
      runner_(StepRunner::Make(config, kernel, device, std::move(rope))) {
  const int64_t pages = config.num_pages(), heads = config.num_kv_heads;
  const bool square = config.head_dim_qk == config.head_dim_vo;
  // Keys and values of a page lie side by side, as in TVM's cache, if their heads are equally long;
  // else all keys lie before all values, and a token has the same number in both.
  const int64_t beside = square && !config.mla ? 2 : 1;
  k_strides_ = {beside * k_page_, int64_t{config.page_size} * config.head_dim_qk,
                config.head_dim_qk};
  v_strides_ = {beside * v_page_, int64_t{config.page_size} * config.head_dim_vo,
                config.head_dim_vo};
  if (config.mla) v_strides_ = k_strides_;  // a value is the start of its key
  for (int32_t layer = 0; layer < config.num_layers(); ++layer) {
    const Shape shape = config.mla ? Shape{pages, config.page_size, config.head_dim_qk}
                        : square   ? Shape{pages, 2, heads, config.page_size, config.head_dim_qk}
                                   : Shape{pages * (k_page_ + v_page_)};
    LayerPool pool{Tensor::Empty(shape, dtype, device), nullptr, nullptr};
    pool.k = static_cast<char*>(DataOf(*pool.data.operator->()));
    pool.v = config.mla ? pool.k : pool.k + (square ? 1 : pages) * k_page_ * element_bytes_;
    if (device.device_type == kDLCPU) {
      PreferHugePages(pool.k, pages * (k_page_ + v_page_) * element_bytes_);
    }
    layers_.push_back(std::move(pool));
  }
  AllocateTwins();
  requests_.reserve(config.max_batch);
  copies_.reserve(config.max_batch);
  page_indptr_.reserve(config.max_batch + 1);
  const int64_t max_pages =
      std::min<int64_t>(int64_t{config.max_batch} * config.num_pages(), INT32_MAX / 2);
  page_ids_.reserve(max_pages);
  layout_.Reserve(config.max_batch, config.max_q_tokens());
}

void KVCacheObj::UseSplitRotary(SplitRotary rotary) {
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const int64_t tokens = config_.max_q_tokens();
  const int64_t queries = config_.sliding_window ? 2 * tokens : tokens;
  rotated_q_ = Tensor::Empty({queries, config_.num_qo_heads, config_.head_dim_qk}, type, device_);
  rotated_k_ = Tensor::Empty({tokens, config_.num_kv_heads, config_.head_dim_qk}, type, device_);
  split_v_ = Tensor::Empty({tokens, config_.num_kv_heads, config_.head_dim_vo}, type, device_);
  split_rotary_ = std::move(rotary);
}

void KVCacheObj::CheckIdle(const char* what) const {
  TVM_FLASHINFER_CHECK(!in_forward_, RuntimeError)
      << what << " was called between begin_forward and end_forward: end the step first";
}

void KVCacheObj::CheckCommitted(int64_t seq_id, const Sequence& sequence, const char* what) const {
  TVM_FLASHINFER_CHECK(sequence.tree.empty(), RuntimeError)
      << what << ": seq_id " << seq_id << " ends in a token tree of " << sequence.tree.size()
      << " nodes: call commit_accepted_token_tree_nodes first";
}

void KVCacheObj::Clear() {
  pages_.Clear();
  import_.reset();
  sends_.clear();
  in_forward_ = false;
}

void KVCacheObj::AddSequence(int64_t seq_id) {
  CheckIdle("add_sequence");
  pages_.Add(seq_id);
}

void KVCacheObj::RemoveSequence(int64_t seq_id) {
  CheckIdle("remove_sequence");
  pages_.Remove(seq_id);
  sends_.erase(seq_id);
  if (import_.has_value() && import_->seq_id == seq_id) import_.reset();
}

void KVCacheObj::ForkSequence(int64_t parent_seq_id, int64_t child_seq_id, int64_t fork_pos) {
  CheckIdle("fork_sequence");
  CheckCommitted(parent_seq_id, *pages_.Find(parent_seq_id), "fork_sequence");
  CheckImported(parent_seq_id, "fork_sequence");
  pages_.Fork(parent_seq_id, child_seq_id, fork_pos);
}

void KVCacheObj::PopN(int64_t seq_id, int32_t n) {
  CheckIdle("popn");
  CheckImported(seq_id, "popn");
  pages_.PopN(seq_id, n);
}

void KVCacheObj::AllocateTwins() {
  if (!config_.sliding_window) return;
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const int64_t queries = int64_t{2} * config_.max_q_tokens();
  twin_o_ = Tensor::Empty({queries, config_.num_qo_heads, config_.head_dim_vo}, type, device_);
  twin_lse_ = Tensor::Empty({queries, config_.num_qo_heads}, {kDLFloat, 32, 1}, device_);
}

void KVCacheObj::EnableSlidingWindowForSeq(int64_t seq_id, int32_t sliding_window_size,
                                           int32_t attn_sink_size) {
  CheckIdle("enable_sliding_window_for_seq");
  if (has_windows()) {  // of some layers; the others see whole sequences
    pages_.Find(seq_id);
    return;
  }
  TVM_FLASHINFER_CHECK(config_.sliding_window, ValueError)
      << "this cache was made with support_sliding_window 0: it keeps whole sequences";
  Sequence* sequence = pages_.Find(seq_id);
  TVM_FLASHINFER_CHECK(attn_sink_size >= 0 && attn_sink_size < sliding_window_size, ValueError)
      << "attn_sink_size " << attn_sink_size
      << " is outside [0, sliding_window_size = " << sliding_window_size << ")";
  TVM_FLASHINFER_CHECK(sequence->window == 0, ValueError)
      << "seq_id " << seq_id << " has a sliding window of " << sequence->window
      << " already: it can be given once";
  TVM_FLASHINFER_CHECK(sequence->dropped == 0 || sequence->hole_begin == attn_sink_size, ValueError)
      << "attn_sink_size is " << attn_sink_size << ", seq_id " << seq_id
      << " was forked from a window with a sink of " << sequence->hole_begin
      << ": what follows that sink is gone";
  sequence->window = sliding_window_size;
  sequence->sink = attn_sink_size;
}

bool KVCacheObj::Empty() const { return pages_.empty() && pages_.num_free() == pages_.num_pages(); }
int32_t KVCacheObj::GetNumAvailablePages() const { return pages_.num_free(); }
int32_t KVCacheObj::GetTotalSequenceLength() const {
  return static_cast<int32_t>(pages_.total_length());
}
int32_t KVCacheObj::GetSequenceLength(int64_t seq_id) const { return pages_.Find(seq_id)->length; }

void KVCacheObj::BeginForward(const Shape& seq_ids, const Shape& append_lengths,
                              const Optional<Shape>& token_tree_parent_ptr) {
  PrepareStep(seq_ids, append_lengths, token_tree_parent_ptr);
  CommitStep();
}

void KVCacheObj::PrepareStep(const Shape& seq_ids, const Shape& append_lengths,
                             const Optional<Shape>& token_tree_parent_ptr) {
  CheckIdle("begin_forward");
  ReadRequests(seq_ids, append_lengths);
  if (token_tree_parent_ptr.has_value()) {
    ReadTrees(seq_ids, *token_tree_parent_ptr);
  } else {
    trees_.clear();
    for (size_t i = 0; i < requests_.size(); ++i) {
      CheckCommitted(seq_ids[i], *requests_[i].sequence, "begin_forward without a token tree");
    }
  }
  pages_.Preview(requests_, &page_indptr_, &page_ids_, &copies_);
  layout_.Build(requests_, page_indptr_, page_ids_, stores_rotated());
  Schedule();
  PlanSends(seq_ids);
  layer_states_.assign(config_.num_layers(), LayerState{});
  runner_->Begin(layout_);
  for (LayerGroup& group : groups_) group.runner->Begin(layout_);
  CopyPages();  // to pages that are free until the step is committed
}

void KVCacheObj::CommitStep() noexcept {
  pages_.Commit(requests_);
  for (size_t i = 0; i < trees_.size(); ++i) requests_[i].sequence->tree = std::move(trees_[i]);
  for (const StepSend& send : step_sends_) send.whole->past = false;
  past_planned_ = own_planned_ = mask_planned_ = false;
  in_forward_ = true;
}

void KVCacheObj::ReadRequests(const Shape& seq_ids, const Shape& append_lengths) {
  TVM_FLASHINFER_CHECK(seq_ids.size() == append_lengths.size(), ValueError)
      << "seq_ids has " << seq_ids.size() << " entries, append_lengths has "
      << append_lengths.size() << ": they go together";
  TVM_FLASHINFER_CHECK(static_cast<int64_t>(seq_ids.size()) <= config_.max_batch, ValueError)
      << "seq_ids has " << seq_ids.size() << " sequences, the cache was made for at most "
      << config_.max_batch;
  const int32_t max_tokens = config_.max_q_tokens();
  int64_t tokens = 0;
  requests_.clear();
  ++step_;
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    Sequence* sequence = pages_.Find(seq_ids[i]);
    CheckImported(seq_ids[i], "begin_forward");
    TVM_FLASHINFER_CHECK(append_lengths[i] >= 0 && append_lengths[i] <= max_tokens, ValueError)
        << "append_lengths[" << i << "] = " << append_lengths[i] << " is outside [0, " << max_tokens
        << "]";
    TVM_FLASHINFER_CHECK(sequence->step != step_, ValueError)
        << "seq_ids names sequence " << seq_ids[i] << " twice";
    sequence->step = step_;
    requests_.push_back({sequence, static_cast<int32_t>(append_lengths[i])});
    tokens += append_lengths[i];
  }
  TVM_FLASHINFER_CHECK(tokens <= max_tokens, ValueError)
      << "append_lengths sum to " << tokens << " tokens, a step of this cache holds at most "
      << max_tokens;
}

void KVCacheObj::Schedule() {
  if (layout_.by_token()) {
    const int64_t blocks = layout_.num_blocks();
    const int64_t largest = pages_.num_pages() * PageStride(config_);
    TVM_FLASHINFER_CHECK(std::max(blocks, largest) <= INT32_MAX / 2, ValueError)
        << "a step with token trees or slid windows lists " << blocks << " tokens of a pool with "
        << largest << " rows, it can number at most " << INT32_MAX / 2;
  }
  runner_->Plan(&layout_);
  for (LayerGroup& group : groups_) group.runner->Plan(&layout_);
}

void KVCacheObj::CopyPages() {
  const bool apart = k_strides_.page == k_page_ && !config_.mla;  // values aren't beside the keys
  const auto copy = [&](char* pool, const KVStrides& strides, PageCopy pages) {
    const int64_t bytes = strides.page * element_bytes_;
    runner_->Copy(pool + pages.to * bytes, pool + pages.from * bytes, bytes);
  };
  for (const PageCopy& pages : copies_) {
    for (LayerPool& layer : layers_) {
      copy(layer.k, k_strides_, pages);
      if (apart) copy(layer.v, v_strides_, pages);
    }
  }
}

void KVCacheObj::EndForward() {
  TVM_FLASHINFER_CHECK(in_forward_, RuntimeError) << "end_forward was called without begin_forward";
  for (const AppendRequest& r : requests_) {
    if (r.sequence->tree.empty()) pages_.Slide(r.sequence);
  }
  in_forward_ = false;
}

Tensor KVCacheObj::GetQueryPositions() {
  TVM_FLASHINFER_CHECK(in_forward_, RuntimeError)
      << "query positions exist between begin_forward and end_forward only";
  return runner_->Positions().CreateView({layout_.num_tokens()}, {kDLInt, 32, 1});
}

Tensor KVCacheObj::PaddedQueryPositions(int64_t num_tokens) {
  GetQueryPositions();
  TVM_FLASHINFER_CHECK(num_tokens >= layout_.num_tokens() && num_tokens <= config_.max_q_tokens(),
                       ValueError)
      << "argument `num_tokens` is " << num_tokens << ", expected " << layout_.num_tokens()
      << ", the tokens of the step, to " << config_.max_q_tokens();
  return runner_->Positions().CreateView({num_tokens}, {kDLInt, 32, 1});
}

int64_t KVCacheObj::GraphKey() const {
  int64_t key = runner_->GraphKey();
  for (const LayerGroup& group : groups_) key = key * 1000003 + group.runner->GraphKey();
  return key;
}

}  // namespace tvm_flashinfer
