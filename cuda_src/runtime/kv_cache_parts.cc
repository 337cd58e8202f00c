// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Attention in parts, whose states the model merges: among a step's own tokens, and over the cache.
// Latent attention (DeepSeek-V2, MLA) is made of these: its cache holds one row a token, and the
// step's own tokens are attended with expanded keys and values.
#include <utility>

#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

void KVCacheObj::UseSelfKernel(int32_t num_kv_heads, KernelHandle kernel) {
  TVM_FLASHINFER_CHECK(num_kv_heads > 0 && config_.num_qo_heads % num_kv_heads == 0, ValueError)
      << "num_qo_heads " << config_.num_qo_heads << " is not a multiple of num_kv_heads "
      << num_kv_heads;
  TVM_FLASHINFER_CHECK(kernel.device_type() == device_.device_type, ValueError)
      << "argument `kernel` was compiled for device type " << static_cast<int>(kernel.device_type())
      << ", this cache is on " << static_cast<int>(device_.device_type);
  self_kernel_ = std::move(kernel);
  self_kv_heads_ = num_kv_heads;
}

void KVCacheObj::CheckParts(const char* what) const {
  TVM_FLASHINFER_CHECK(!has_variant_ || variant_merges_, NotImplementedError)
      << what << " in a cache with a variant under which states of parts don't merge";
  TVM_FLASHINFER_CHECK(layout_.num_levels() == 1 && !layout_.splits(), NotImplementedError)
      << what << " in a step with token trees, or with rotated keys behind a slid window";
}

void KVCacheObj::SelfAttention(int64_t layer_id, Tensor q_data, Tensor k_data, Tensor v_data,
                               Tensor o_data, Tensor lse_data, double sm_scale) {
  const int32_t layer = CheckStep(layer_id);
  CheckParts("self_attention");
  TVM_FLASHINFER_CHECK(GroupOf(layer) == nullptr || RunnerOf(layer)->window() > 0,
                       NotImplementedError)
      << "self_attention in layer " << layer_id << ", which has a kernel of its own";
  const KernelHandle& kernel = self_kernel_.has_value() ? *self_kernel_ : kernel_;
  TVM_FLASHINFER_CHECK(!config_.mla || self_kernel_.has_value(), ValueError)
      << "self_attention: this cache of latent attention was made without a kernel for it";
  const DLDataType type = ToDLDataType(kernel->q_type);
  const int64_t tokens = layout_.num_tokens(), heads = config_.num_qo_heads;
  const int64_t kv_heads = self_kernel_.has_value() ? self_kv_heads_ : config_.num_kv_heads;
  const int64_t qk = kernel->head_dim_qk, vo = kernel->head_dim_vo;
  CheckTensor("q_data", *q_data.operator->(), type, device_, {tokens, heads, qk});
  CheckTensor("k_data", *k_data.operator->(), type, device_, {tokens, kv_heads, qk});
  CheckTensor("v_data", *v_data.operator->(), type, device_, {tokens, kv_heads, vo});
  CheckTensor("o_data", *o_data.operator->(), type, device_, {tokens, heads, vo});
  CheckTensor("lse_data", *lse_data.operator->(), {kDLFloat, 32, 1}, device_, {tokens, heads});
  if (own_ == nullptr) {
    KVCacheConfig config = config_;
    config.max_total_seq_len = config_.max_q_tokens();
    config.page_size = 1;
    config.sliding_window = config.mla = false;
    config.num_kv_heads = static_cast<int32_t>(kv_heads);
    config.head_dim_qk = static_cast<int32_t>(qk);
    config.head_dim_vo = static_cast<int32_t>(vo);
    own_ = StepRunner::Make(config, kernel, device_, std::nullopt);
    if (has_variant_) own_->UseVariant(*runner_->variant_args());
  }
  if (!own_planned_) {
    own_layout_.BuildOwn(requests_);
    own_->Plan(&own_layout_);
    own_->Begin(own_layout_);
    own_planned_ = true;
  }
  AttentionParams params{};
  params.q = DataOf(*q_data.operator->());
  params.k = DataOf(*k_data.operator->());
  params.v = DataOf(*v_data.operator->());
  params.o = DataOf(*o_data.operator->());
  params.lse = static_cast<float*>(DataOf(*lse_data.operator->()));
  params.variant_params = own_->variant_args();
  params.q_token_stride = heads * qk;
  params.q_head_stride = qk;
  params.o_token_stride = heads * vo;
  params.o_head_stride = vo;
  params.k_strides = {kv_heads * qk, qk, kv_heads * qk};
  params.v_strides = {kv_heads * vo, vo, kv_heads * vo};
  params.page_size = 1;
  params.num_qo_heads = static_cast<int32_t>(heads);
  params.num_kv_heads = static_cast<int32_t>(kv_heads);
  params.sm_scale = static_cast<float>(sm_scale);
  own_->Attend(&params);
  layer_states_[layer].attended_own = true;
}

void KVCacheObj::CrossAttention(int64_t layer_id, Tensor q_data, Tensor o_data, Tensor lse_data,
                                double sm_scale) {
  const int32_t layer = CheckStep(layer_id);
  CheckParts("cross_attention");
  TVM_FLASHINFER_CHECK(GroupOf(layer) == nullptr, NotImplementedError)
      << "cross_attention in layer " << layer_id << ", which has a window or a kernel of its own";
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const int64_t tokens = layout_.num_tokens(), heads = config_.num_qo_heads;
  const int64_t qk = config_.head_dim_qk, vo = config_.head_dim_vo;
  CheckTensor("q_data", *q_data.operator->(), type, device_, {tokens, heads, qk});
  CheckTensor("o_data", *o_data.operator->(), type, device_, {tokens, heads, vo});
  CheckTensor("lse_data", *lse_data.operator->(), {kDLFloat, 32, 1}, device_, {tokens, heads});
  const LayerState& state = layer_states_[layer];
  const bool whole = state.stored && !state.attended_own;
  StepRunner* runner = runner_.get();
  if (!whole) {
    if (past_ == nullptr) {
      past_ = StepRunner::Make(config_, kernel_, device_, std::nullopt);
      if (has_variant_) past_->UseVariant(*runner_->variant_args());
    }
    if (!past_planned_) {
      past_layout_.BuildPast(requests_, page_indptr_, page_ids_);
      past_->Plan(&past_layout_);
      past_->Begin(past_layout_);
      past_planned_ = true;
    }
    runner = past_.get();
  }
  AttentionParams params = Operands(layer, whole ? layout_ : past_layout_, sm_scale,
                                    {DataOf(*q_data.operator->()), heads * qk, qk},
                                    {DataOf(*o_data.operator->()), heads * vo, vo});
  params.lse = static_cast<float*>(DataOf(*lse_data.operator->()));
  params.variant_params = runner->variant_args();
  runner->Attend(&params);
}

void KVCacheObj::AppendMLAKV(int64_t layer_id, Tensor kv_data) {
  const int32_t layer = CheckStep(layer_id);
  TVM_FLASHINFER_CHECK(config_.mla, ValueError)
      << "append_mla_kv: this cache is not one of latent attention (mla)";
  const int64_t dim = config_.head_dim_qk;
  CheckTensor("kv_data", *kv_data.operator->(), ToDLDataType(kernel_->q_type), device_,
              {layout_.num_tokens(), dim});
  const TokenHeads rows{DataOf(*kv_data.operator->()), dim, dim};
  TokenHeads no_queries{};
  Append(layer, &no_queries, rows, rows, layout_.num_tokens());
}

/*! Call copy(pool row, row of kv_data, bytes). */
template <typename Copy>
void KVCacheObj::ForEachLatentRow(int64_t seq_id, int64_t start, int64_t end, const Tensor& kv_data,
                                  const Copy& copy) {
  TVM_FLASHINFER_CHECK(config_.mla, ValueError)
      << "this cache is not one of latent attention (mla): debug_get_kv and debug_set_kv are for "
         "it";
  CheckRange(seq_id, start, end);
  CheckTensor("kv_data", *kv_data.operator->(), dtype_, device_,
              {config_.num_layers(), end - start, config_.head_dim_qk});
  const Sequence* sequence = pages_.Find(seq_id);
  char* at = static_cast<char*>(DataOf(*kv_data.operator->()));
  const int64_t bytes = k_strides_.token * element_bytes_;
  for (const LayerPool& layer : layers_) {
    for (int64_t token = start; token < end; ++token, at += bytes) {
      const int32_t slot = sequence->Slot(static_cast<int32_t>(token));
      const int64_t row = int64_t{sequence->pages[slot / config_.page_size]} * config_.page_size +
                          slot % config_.page_size;
      copy(layer.k + row * bytes, at, bytes);
    }
  }
  runner_->Wait();
}

void KVCacheObj::DebugGetKVMLA(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor kv_data) {
  ForEachLatentRow(seq_id, start_pos, end_pos, kv_data,
                   [&](char* pool, char* row, int64_t bytes) { runner_->Copy(row, pool, bytes); });
}

void KVCacheObj::DebugSetKVMLA(int64_t seq_id, int64_t start_pos, Tensor kv_data) {
  TVM_FLASHINFER_CHECK(kv_data->ndim == 3, ValueError)
      << "argument `kv_data` has " << kv_data->ndim << " axes, expected (layer, token, dim)";
  ForEachLatentRow(seq_id, start_pos, start_pos + kv_data->shape[1], kv_data,
                   [&](char* pool, char* row, int64_t bytes) { runner_->Copy(pool, row, bytes); });
}

}  // namespace tvm_flashinfer
