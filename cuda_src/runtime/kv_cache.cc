// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "kv_cache.h"

#include <tvm_flashinfer/variant.h>


#include <algorithm>
#include <cstring>
#include <utility>

#include "check.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::ffi::Optional;
using tvm::ffi::String;

PlanBounds KVCacheObj::MakeBounds(const KVCacheConfig& config, const CpuKernel& kernel) {
  const int32_t group = config.num_qo_heads / config.num_kv_heads;
  PlanBounds b;
  b.max_requests = config.max_batch;
  b.max_q_tokens = config.max_q_tokens();
  // Sequences that share pages each list them: any one may span the whole pool.
  b.max_kv_pages = static_cast<int32_t>(
      std::min<int64_t>(int64_t{config.max_batch} * config.num_pages(), INT32_MAX / 2));
  b.num_workers = CpuExecutor::NumThreads();
  b.num_kv_heads = config.num_kv_heads;
  b.max_tile_tokens = std::max(1, kernel.row_tiles[1] / group);
  return b;
}

KVCacheObj::KVCacheObj(const KVCacheConfig& config, KernelHandle kernel, DLDataType dtype,
                       DLDevice device)
    : config_(config),
      kernel_(kernel),
      dtype_(dtype),
      device_(device),
      element_bytes_(dtype.bits / 8),
      pages_(config.num_pages(), config.page_size),
      bounds_(MakeBounds(config, *kernel)),
      scheduler_(bounds_),
      executor_(kernel, std::max(kernel->row_tiles[1], config.num_qo_heads / config.num_kv_heads)) {
  const bool square = config.head_dim_qk == config.head_dim_vo;
  const int64_t heads = config.num_kv_heads;
  const int64_t k_page = heads * config.page_size * config.head_dim_qk;
  const int64_t v_page = heads * config.page_size * config.head_dim_vo;
  k_strides_ = {k_page + v_page, int64_t{config.page_size} * config.head_dim_qk, config.head_dim_qk};
  v_strides_ = {k_page + v_page, int64_t{config.page_size} * config.head_dim_vo, config.head_dim_vo};
  for (int32_t layer = 0; layer < config.num_layers(); ++layer) {
    const Shape shape =
        square ? Shape{config.num_pages(), 2, heads, config.page_size, config.head_dim_qk}
               : Shape{config.num_pages(), k_page + v_page};
    LayerPool pool{Tensor::Empty(shape, dtype, device), nullptr, nullptr};
    pool.k = static_cast<char*>(DataOf(*pool.data.operator->()));
    pool.v = pool.k + k_page * element_bytes_;
    layers_.push_back(std::move(pool));
  }
  positions_ = Tensor::Empty({config.max_q_tokens()}, {kDLInt, 32, 1}, device);

  const PlanLayout& layout = scheduler_.layout();
  for (auto& plan : plans_) plan.resize(layout.total);
  o_partial_.resize(layout.max_partials * config.num_qo_heads * config.head_dim_vo);
  lse_partial_.resize(layout.max_partials * config.num_qo_heads);
  requests_.reserve(config.max_batch);
  copies_.reserve(config.max_batch);
  for (auto* indptr : {&qo_indptr_, &kv_indptr_}) indptr->reserve(config.max_batch + 1);
  for (auto* lengths : {&kv_len_, &last_block_len_}) lengths->reserve(config.max_batch);
  kv_indices_.reserve(bounds_.max_kv_pages);
  slots_.reserve(config.max_q_tokens());
}

void KVCacheObj::CheckIdle(const char* what) const {
  TVM_FLASHINFER_CHECK(!in_forward_, RuntimeError)
      << what << " was called between begin_forward and end_forward: end the step first";
}

void KVCacheObj::Clear() {
  pages_.Clear();
  in_forward_ = false;
}

void KVCacheObj::AddSequence(int64_t seq_id) {
  CheckIdle("add_sequence");
  pages_.Add(seq_id);
}

void KVCacheObj::RemoveSequence(int64_t seq_id) {
  CheckIdle("remove_sequence");
  pages_.Remove(seq_id);
}

void KVCacheObj::ForkSequence(int64_t parent_seq_id, int64_t child_seq_id, int64_t fork_pos) {
  CheckIdle("fork_sequence");
  pages_.Fork(parent_seq_id, child_seq_id, fork_pos);
}

void KVCacheObj::PopN(int64_t seq_id, int32_t n) {
  CheckIdle("popn");
  pages_.PopN(seq_id, n);
}

bool KVCacheObj::Empty() const { return pages_.num_free() == pages_.num_pages(); }
int32_t KVCacheObj::GetNumAvailablePages() const { return pages_.num_free(); }
int32_t KVCacheObj::GetTotalSequenceLength() const {
  return static_cast<int32_t>(pages_.total_length());
}
int32_t KVCacheObj::GetSequenceLength(int64_t seq_id) const { return pages_.Find(seq_id)->length; }

void KVCacheObj::BeginForward(const Shape& seq_ids, const Shape& append_lengths,
                              const Optional<Shape>& token_tree_parent_ptr) {
  CheckIdle("begin_forward");
  TVM_FLASHINFER_CHECK(!token_tree_parent_ptr.has_value(), NotImplementedError)
      << "token_tree_parent_ptr: this cache serves chains of tokens, not trees";
  TVM_FLASHINFER_CHECK(seq_ids.size() == append_lengths.size(), ValueError)
      << "seq_ids has " << seq_ids.size() << " entries, append_lengths has "
      << append_lengths.size() << ": they go together";
  TVM_FLASHINFER_CHECK(static_cast<int64_t>(seq_ids.size()) <= config_.max_batch, ValueError)
      << "seq_ids has " << seq_ids.size() << " sequences, the cache was made for at most "
      << config_.max_batch;
  int64_t tokens = 0;
  requests_.clear();
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    Sequence* sequence = pages_.Find(seq_ids[i]);
    TVM_FLASHINFER_CHECK(append_lengths[i] >= 0 && append_lengths[i] <= config_.max_q_tokens(), ValueError)
        << "append_lengths[" << i << "] = " << append_lengths[i] << " is outside [0, "
        << config_.max_q_tokens() << "]";
    for (const AppendRequest& earlier : requests_) {
      TVM_FLASHINFER_CHECK(earlier.sequence != sequence, ValueError)
          << "seq_ids names sequence " << seq_ids[i] << " twice";
    }
    requests_.push_back({sequence, static_cast<int32_t>(append_lengths[i])});
    tokens += append_lengths[i];
  }
  TVM_FLASHINFER_CHECK(tokens <= config_.max_q_tokens(), ValueError)
      << "append_lengths sum to " << tokens << " tokens, a step of this cache holds at most "
      << config_.max_q_tokens();
  pages_.Preview(requests_, &kv_indptr_, &kv_indices_);
  num_tokens_ = static_cast<int32_t>(tokens);
  // Everything that can fail comes before Commit: a failed step leaves the cache as it was.
  Schedule(append_lengths);
  pages_.Commit(requests_, &copies_);
  CopyPages();
  in_forward_ = true;
}

void KVCacheObj::Schedule(const Shape& append_lengths) {
  const int32_t page_size = config_.page_size;
  const int32_t num_requests = static_cast<int32_t>(requests_.size());
  qo_indptr_.assign(1, 0);
  kv_len_.clear();
  last_block_len_.clear();
  slots_.clear();
  for (int32_t r = 0; r < num_requests; ++r) {
    const int32_t old_length = requests_[r].sequence->length;
    const int32_t length = old_length + static_cast<int32_t>(append_lengths[r]);
    qo_indptr_.push_back(qo_indptr_.back() + requests_[r].count);
    kv_len_.push_back(length);
    last_block_len_.push_back(length == 0 ? 0 : (length - 1) % page_size + 1);
    const int32_t* pages = kv_indices_.data() + kv_indptr_[r];
    for (int32_t t = old_length; t < length; ++t) {
      slots_.push_back(int64_t{pages[t / page_size]} * page_size + t % page_size);
    }
  }
  LayoutLevel level;
  level.num_rows = num_requests;
  level.qo_indptr = qo_indptr_.data();
  level.kv_indptr = kv_indptr_.data();
  level.kv_indices = kv_indices_.data();
  level.last_block_len = last_block_len_.data();
  ScheduleInput in;
  in.num_requests = num_requests;
  in.qo_indptr = qo_indptr_.data();
  in.kv_len = kv_len_.data();
  in.levels = &level;
  in.page_size = page_size;
  in.causal = kernel_->causal != 0;
  in.group = config_.num_qo_heads / config_.num_kv_heads;
  in.tile_tokens =
      ChooseTileTokens(num_tokens_, num_requests, in.group, kernel_->row_tiles, 2);
  in.kv_align = kernel_->kv_align;
  in.shared_queue = true;
  const int32_t next = plan_ ^ 1;
  scheduler_.Plan(in, plans_[next].data());
  plan_ = next;
  const PlanView view = PlanView::Make(plans_[plan_].data(), scheduler_.layout(), bounds_);
  std::copy_n(view.q_position, num_tokens_,
              static_cast<int32_t*>(DataOf(*positions_.operator->())));
}

void KVCacheObj::CopyPages() {
  const int64_t page_bytes = k_strides_.page * element_bytes_;
  for (const PageCopy& copy : copies_) {
    for (LayerPool& layer : layers_) {
      std::memcpy(layer.k + copy.to * page_bytes, layer.k + copy.from * page_bytes, page_bytes);
    }
  }
}

void KVCacheObj::EndForward() {
  TVM_FLASHINFER_CHECK(in_forward_, RuntimeError) << "end_forward was called without begin_forward";
  in_forward_ = false;
}

Tensor KVCacheObj::GetQueryPositions() {
  TVM_FLASHINFER_CHECK(in_forward_, RuntimeError)
      << "query positions exist between begin_forward and end_forward only";
  return positions_.CreateView({num_tokens_}, {kDLInt, 32, 1});
}

int32_t KVCacheObj::CheckStep(int64_t layer_id) const {
  TVM_FLASHINFER_CHECK(in_forward_, RuntimeError)
      << "attention was called outside begin_forward and end_forward";
  TVM_FLASHINFER_CHECK(layer_id >= config_.layer_begin && layer_id < config_.layer_end, ValueError)
      << "layer_id " << layer_id << " is outside [" << config_.layer_begin << ", "
      << config_.layer_end << "), the layers of this cache";
  return static_cast<int32_t>(layer_id) - config_.layer_begin;
}

void KVCacheObj::AttentionWithFusedQKV(int64_t layer_id, Tensor qkv_data, Optional<Tensor> mask,
                                       Tensor o_data, double sm_scale) {
  const int32_t layer = CheckStep(layer_id);
  TVM_FLASHINFER_CHECK(!mask.has_value(), NotImplementedError)
      << "argument `mask`: this cache takes its mask from the kernel's variant";
  TVM_FLASHINFER_CHECK(config_.head_dim_qk == config_.head_dim_vo, ValueError)
      << "argument `qkv_data` fuses heads of one size, this cache has head_dim_qk "
      << config_.head_dim_qk << " and head_dim_vo " << config_.head_dim_vo;
  const int64_t dim = config_.head_dim_qk;
  const int64_t heads = config_.num_qo_heads + 2 * config_.num_kv_heads;
  const DLDataType type = ToDLDataType(kernel_->q_type);
  CheckTensor("qkv_data", *qkv_data.operator->(), type, device_, {num_tokens_, heads, dim});
  CheckTensor("o_data", *o_data.operator->(), type, device_,
              {num_tokens_, config_.num_qo_heads, dim});
  char* qkv = static_cast<char*>(DataOf(*qkv_data.operator->()));
  const int64_t head_bytes = dim * (type.bits / 8);
  char* k = qkv + config_.num_qo_heads * head_bytes;
  char* v = k + config_.num_kv_heads * head_bytes;
  Attend(layer, sm_scale, {qkv, heads * dim, dim}, {k, heads * dim, dim}, {v, heads * dim, dim},
         {DataOf(*o_data.operator->()), config_.num_qo_heads * dim, dim});
}

void KVCacheObj::Attention(int64_t layer_id, double sm_scale, const DLTensor& q, const DLTensor& k,
                           const DLTensor& v, const DLTensor& o, bool head_major) {
  const int32_t layer = CheckStep(layer_id);
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const auto operand = [&](const char* name, const DLTensor& t, int64_t heads, int64_t dim,
                           bool by_head) -> TokenHeads {
    if (by_head) {
      CheckTensor(name, t, type, device_, {heads, num_tokens_, dim});
      return {DataOf(t), dim, num_tokens_ * dim};
    }
    CheckTensor(name, t, type, device_, {num_tokens_, heads, dim});
    return {DataOf(t), heads * dim, dim};
  };
  Attend(layer, sm_scale, operand("q", q, config_.num_qo_heads, config_.head_dim_qk, head_major),
         operand("k", k, config_.num_kv_heads, config_.head_dim_qk, head_major),
         operand("v", v, config_.num_kv_heads, config_.head_dim_vo, head_major),
         operand("o", o, config_.num_qo_heads, config_.head_dim_vo, false));
}

void KVCacheObj::AppendTo(char* pool, const KVStrides& strides, TokenHeads source, int32_t dim) {
  AppendParams params;
  params.source = source.data;
  params.source_token_stride = source.token_stride;
  params.source_head_stride = source.head_stride;
  params.pool = pool;
  params.strides = strides;
  params.slots = slots_.data();
  params.page_size = config_.page_size;
  params.num_heads = config_.num_kv_heads;
  params.dim = dim;
  executor_.Append(params, num_tokens_);
}

void KVCacheObj::Attend(int32_t layer, double sm_scale, TokenHeads q, TokenHeads k, TokenHeads v,
                        TokenHeads o) {
  const LayerPool& pool = layers_[layer];
  AppendTo(pool.k, k_strides_, k, config_.head_dim_qk);
  AppendTo(pool.v, v_strides_, v, config_.head_dim_vo);
  static const StandardVariantParams kVariantParams{};
  AttentionParams params{};
  params.q = q.data;
  params.k = pool.k;
  params.v = pool.v;
  params.o = o.data;
  params.o_partial = o_partial_.data();
  params.lse_partial = lse_partial_.data();
  params.variant_params = &kVariantParams;
  params.q_token_stride = q.token_stride;
  params.q_head_stride = q.head_stride;
  params.o_token_stride = o.token_stride;
  params.o_head_stride = o.head_stride;
  params.k_strides = k_strides_;
  params.v_strides = v_strides_;
  params.page_size = config_.page_size;
  params.num_qo_heads = config_.num_qo_heads;
  params.num_kv_heads = config_.num_kv_heads;
  params.sm_scale = static_cast<float>(sm_scale);
  params.plan = PlanView::Make(plans_[plan_].data(), scheduler_.layout(), bounds_);
  executor_.Run(params);
}

void KVCacheObj::CheckDebugTensors(const Tensor& k, const Tensor& v, int64_t length) const {
  CheckTensor("k_data", *k.operator->(), dtype_, device_,
              {config_.num_layers(), length, config_.num_kv_heads, config_.head_dim_qk});
  CheckTensor("v_data", *v.operator->(), dtype_, device_,
              {config_.num_layers(), length, config_.num_kv_heads, config_.head_dim_vo});
}

/*! Call copy(pool row, byte offset in a (layer, token, head, dim) tensor, bytes, is_k). */
template <typename Copy>
void KVCacheObj::ForEachRow(int64_t seq_id, int64_t start, int64_t end, const Copy& copy) {
  const Sequence* sequence = pages_.Find(seq_id);
  TVM_FLASHINFER_CHECK(start >= 0 && start <= end && end <= sequence->length, ValueError)
      << "range [" << start << ", " << end << ") is outside sequence " << seq_id << " of length "
      << sequence->length;
  const int64_t length = end - start;
  for (int32_t layer = 0; layer < config_.num_layers(); ++layer) {
    for (int64_t t = start; t < end; ++t) {
      const int64_t page = sequence->pages[t / config_.page_size];
      const int64_t slot = t % config_.page_size;
      for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
        const int64_t row = (layer * length + t - start) * config_.num_kv_heads + head;
        for (const bool is_k : {true, false}) {
          const KVStrides& s = is_k ? k_strides_ : v_strides_;
          const int64_t bytes = s.token * element_bytes_;
          char* pool = is_k ? layers_[layer].k : layers_[layer].v;
          const int64_t at = page * s.page + head * s.head + slot * s.token;
          copy(pool + at * element_bytes_, row * bytes, bytes, is_k);
        }
      }
    }
  }
}

void KVCacheObj::DebugGetKV(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor k_data,
                            Tensor v_data) {
  CheckDebugTensors(k_data, v_data, end_pos - start_pos);
  char* k = static_cast<char*>(DataOf(*k_data.operator->()));
  char* v = static_cast<char*>(DataOf(*v_data.operator->()));
  ForEachRow(seq_id, start_pos, end_pos, [&](char* row, int64_t at, int64_t bytes, bool is_k) {
    std::memcpy((is_k ? k : v) + at, row, bytes);
  });
}

void KVCacheObj::DebugSetKV(int64_t seq_id, int64_t start_pos, Tensor k_data, Tensor v_data) {
  TVM_FLASHINFER_CHECK(k_data->ndim == 4, ValueError)
      << "argument `k_data` has " << k_data->ndim << " axes, expected (layer, token, head, dim)";
  const int64_t length = k_data->shape[1];
  CheckDebugTensors(k_data, v_data, length);
  const char* k = static_cast<const char*>(DataOf(*k_data.operator->()));
  const char* v = static_cast<const char*>(DataOf(*v_data.operator->()));
  ForEachRow(seq_id, start_pos, start_pos + length,
             [&](char* row, int64_t at, int64_t bytes, bool is_k) {
               std::memcpy(row, (is_k ? k : v) + at, bytes);
             });
}

namespace {
[[noreturn]] void Unsupported(const char* what) {
  TVM_FFI_THROW(NotImplementedError)
      << "tvm_flashinfer.KVCache does not serve " << what << " in this release";
  __builtin_unreachable();
}
}  // namespace

void KVCacheObj::EnableSlidingWindowForSeq(int64_t, int32_t, int32_t) {
  Unsupported("enable_sliding_window_for_seq");
}
void KVCacheObj::CommitAcceptedTokenTreeNodes(const Shape&, const Shape&) {
  Unsupported("commit_accepted_token_tree_nodes");
}
String KVCacheObj::GetCheckpointMetadata(int64_t) const { Unsupported("get_checkpoint_metadata"); }
String KVCacheObj::GetLayoutHash() const { Unsupported("get_layout_hash"); }
void KVCacheObj::ExportPageGroup(int64_t, int64_t, Tensor) { Unsupported("export_page_group"); }
void KVCacheObj::PrepareImport(int64_t, String) { Unsupported("prepare_import"); }
void KVCacheObj::ImportPageGroup(int64_t, int64_t, Tensor) { Unsupported("import_page_group"); }
void KVCacheObj::FinishImport(int64_t) { Unsupported("finish_import"); }
Shape KVCacheObj::DisaggPrepareRecv(int64_t, int) { Unsupported("disagg_prepare_recv"); }
void KVCacheObj::DisaggMarkSend(int64_t, int64_t, const Shape&, int32_t) {
  Unsupported("disagg_mark_send");
}
void KVCacheObj::SelfAttention(int64_t, Tensor, Tensor, Tensor, Tensor, Tensor, double) {
  Unsupported("self_attention");
}
void KVCacheObj::CrossAttention(int64_t, Tensor, Tensor, Tensor, double) {
  Unsupported("cross_attention");
}
void KVCacheObj::AttentionWithSharedKV(int64_t, Tensor, Tensor, Tensor, Tensor, double) {
  Unsupported("attention_with_shared_kv");
}
void KVCacheObj::AppendMLAKV(int64_t, Tensor) { Unsupported("append_mla_kv"); }
tvm::ffi::Array<Tensor> KVCacheObj::MergeAttnOutputInplace(Tensor, Tensor, Tensor, Tensor) {
  Unsupported("merge_attn_output_inplace");
}
void KVCacheObj::LinearAttention(int64_t, Tensor, Tensor, Tensor, double) {
  Unsupported("linear_attention");
}
void KVCacheObj::DebugGetKVMLA(int64_t, int64_t, int64_t, Tensor) { Unsupported("debug_get_kv_mla"); }

}  // namespace tvm_flashinfer
