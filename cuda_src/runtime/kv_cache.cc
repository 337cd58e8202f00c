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

/*! Distance of pages over distance of tokens, where values are as long as keys. */
static int64_t PageStride(const KVCacheConfig& config) {
  return config.mla ? config.page_size : int64_t{2} * config.num_kv_heads * config.page_size;
}

KVCacheObj::KVCacheObj(const KVCacheConfig& config, KernelHandle kernel, DLDataType dtype,
                       DLDevice device, std::optional<RopeConfig> rope)
    : config_(config),
      kernel_(kernel),
      dtype_(dtype),
      device_(device),
      element_bytes_(dtype.bits / 8),
      rotates_(rope.has_value()),
      pages_(config.num_pages(), config.page_size),
      rope_config_(rope),
      layout_(config.page_size, PageStride(config)),
      past_layout_(config.page_size, PageStride(config)),
      own_layout_(1, 1),
      runner_(StepRunner::Make(config, kernel, device, std::move(rope))) {
  const bool square = config.head_dim_qk == config.head_dim_vo;
  const int64_t heads = config.num_kv_heads;
  const int64_t k_page = heads * config.page_size * config.head_dim_qk;
  const int64_t v_page = config.mla ? 0 : heads * config.page_size * config.head_dim_vo;
  k_strides_ = {k_page + v_page, int64_t{config.page_size} * config.head_dim_qk,
                config.head_dim_qk};
  v_strides_ = {k_page + v_page, int64_t{config.page_size} * config.head_dim_vo,
                config.head_dim_vo};
  if (config.mla) v_strides_ = k_strides_;  // a value is the start of its key
  for (int32_t layer = 0; layer < config.num_layers(); ++layer) {
    const Shape shape =
        config.mla ? Shape{config.num_pages(), config.page_size, config.head_dim_qk}
        : square   ? Shape{config.num_pages(), 2, heads, config.page_size, config.head_dim_qk}
                   : Shape{config.num_pages(), k_page + v_page};
    LayerPool pool{Tensor::Empty(shape, dtype, device), nullptr, nullptr};
    pool.k = static_cast<char*>(DataOf(*pool.data.operator->()));
    pool.v = config.mla ? pool.k : pool.k + k_page * element_bytes_;
    if (device.device_type == kDLCPU) {
      PreferHugePages(pool.k, config.num_pages() * (k_page + v_page) * element_bytes_);
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
  layout_.Reserve(config.max_batch, config.max_q_tokens(), max_pages);
}

void KVCacheObj::UseSplitRotary(SplitRotary rotary) {
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const int64_t tokens = config_.max_q_tokens();
  if (config_.sliding_window) origins_ = Tensor::Empty({tokens}, {kDLInt, 32, 1}, device_);
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
  if (sliding_ != nullptr) {  // its layers have their window; the others see whole sequences
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
  if (kernel_->num_params > 0 && !has_variant_) variant_.Get(*kernel_);
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
  pages_.Preview(requests_, &page_indptr_, &page_ids_);
  layout_.Build(requests_, page_indptr_, page_ids_, rotates());
  // Everything that can fail comes before Commit: a failed step leaves the cache as it was.
  Schedule();
  pages_.Commit(requests_, &copies_);
  for (size_t i = 0; i < trees_.size(); ++i) requests_[i].sequence->tree = std::move(trees_[i]);
  CopyPages();
  runner_->Begin(layout_);
  if (sliding_ != nullptr) sliding_->Begin(layout_);
  past_planned_ = own_planned_ = false;
  PlanSends(seq_ids);
  layer_states_.assign(config_.num_layers(), LayerState{});
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
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    Sequence* sequence = pages_.Find(seq_ids[i]);
    CheckImported(seq_ids[i], "begin_forward");
    TVM_FLASHINFER_CHECK(append_lengths[i] >= 0 && append_lengths[i] <= max_tokens, ValueError)
        << "append_lengths[" << i << "] = " << append_lengths[i] << " is outside [0, " << max_tokens
        << "]";
    for (const AppendRequest& earlier : requests_) {
      TVM_FLASHINFER_CHECK(earlier.sequence != sequence, ValueError)
          << "seq_ids names sequence " << seq_ids[i] << " twice";
    }
    requests_.push_back({sequence, static_cast<int32_t>(append_lengths[i])});
    tokens += append_lengths[i];
  }
  TVM_FLASHINFER_CHECK(tokens <= max_tokens, ValueError)
      << "append_lengths sum to " << tokens << " tokens, a step of this cache holds at most "
      << max_tokens;
}

void KVCacheObj::Schedule() {
  if (layout_.by_token()) {
    TVM_FLASHINFER_CHECK(config_.mla || config_.head_dim_qk == config_.head_dim_vo,
                         NotImplementedError)
        << "token trees and sliding windows need head_dim_qk equal to head_dim_vo, this cache has "
        << config_.head_dim_qk << " and " << config_.head_dim_vo;
    const int64_t blocks = layout_.num_blocks();
    const int64_t largest =
        int64_t{pages_.num_pages()} * 2 * config_.num_kv_heads * config_.page_size;
    TVM_FLASHINFER_CHECK(std::max(blocks, largest) <= INT32_MAX / 2, ValueError)
        << "a step with token trees or slid windows lists " << blocks << " tokens of a pool with "
        << largest << " rows, it can number at most " << INT32_MAX / 2;
  }
  runner_->Plan(&layout_);
  if (sliding_ != nullptr) sliding_->Plan(&layout_);
}

void KVCacheObj::CopyPages() {
  const int64_t page_bytes = k_strides_.page * element_bytes_;
  for (const PageCopy& copy : copies_) {
    for (LayerPool& layer : layers_) {
      runner_->Copy(layer.k + copy.to * page_bytes, layer.k + copy.from * page_bytes, page_bytes);
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

Tensor KVCacheObj::Origins() {
  if (layout_.origins() == layout_.positions()) return GetQueryPositions();
  std::copy(layout_.origins().begin(), layout_.origins().end(),
            static_cast<int32_t*>(DataOf(*origins_.operator->())));
  return origins_.CreateView({layout_.num_tokens()}, {kDLInt, 32, 1});
}

Tensor KVCacheObj::GetQueryPositions() {
  TVM_FLASHINFER_CHECK(in_forward_, RuntimeError)
      << "query positions exist between begin_forward and end_forward only";
  return runner_->Positions().CreateView({layout_.num_tokens()}, {kDLInt, 32, 1});
}

int64_t KVCacheObj::GraphKey() const { return runner_->GraphKey(); }

}  // namespace tvm_flashinfer
