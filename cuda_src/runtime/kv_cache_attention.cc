// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The attention of one layer of a step, in the forms that models call.
#include <tvm_flashinfer/variant.h>

#include <algorithm>

#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::ffi::Optional;

int32_t KVCacheObj::CheckStep(int64_t layer_id) const {
  TVM_FLASHINFER_CHECK(in_forward_, RuntimeError)
      << "attention was called outside begin_forward and end_forward";
  TVM_FLASHINFER_CHECK(layer_id >= config_.layer_begin && layer_id < config_.layer_end, ValueError)
      << "layer_id " << layer_id << " is outside [" << config_.layer_begin << ", "
      << config_.layer_end << "), the layers of this cache";
  return static_cast<int32_t>(layer_id) - config_.layer_begin;
}

static Tensor WithoutPadding(const Tensor& t, int64_t tokens) {
  if (t->ndim != 3 || t->shape[0] <= tokens) return t;
  return t.CreateView({tokens, t->shape[1], t->shape[2]}, t->dtype);
}

int64_t KVCacheObj::LaunchedTokens(const DLTensor& operand) const {
  const int64_t tokens = layout_.num_tokens();
  if (operand.ndim != 3 || operand.shape[0] <= tokens || layout_.splits()) return tokens;
  TVM_FLASHINFER_CHECK(operand.shape[0] <= config_.max_q_tokens(), ValueError)
      << "operands are padded to " << operand.shape[0] << " tokens, a step of this cache holds at "
      << "most " << config_.max_q_tokens();
  return operand.shape[0];
}

void KVCacheObj::AttentionWithFusedQKV(int64_t layer_id, Tensor qkv_data, Optional<Tensor> mask,
                                       Tensor o_data, double sm_scale) {
  const int32_t layer = CheckStep(layer_id);
  TVM_FLASHINFER_CHECK(!config_.mla, ValueError)
      << "attention_with_fused_qkv: this cache is one of latent attention (mla)";
  TVM_FLASHINFER_CHECK(config_.head_dim_qk == config_.head_dim_vo, ValueError)
      << "argument `qkv_data` fuses heads of one size, this cache has head_dim_qk "
      << config_.head_dim_qk << " and head_dim_vo " << config_.head_dim_vo;
  const int64_t dim = config_.head_dim_qk;
  const int64_t tokens = layout_.num_tokens();
  const int64_t heads = config_.num_qo_heads + 2 * config_.num_kv_heads;
  const DLDataType type = ToDLDataType(kernel_->q_type);
  // A model may pad a step's tokens: what follows them is neither stored nor attended.
  const int64_t launched = LaunchedTokens(*qkv_data.operator->());
  const Tensor padded_qkv = qkv_data;
  qkv_data = WithoutPadding(qkv_data, tokens);
  o_data = WithoutPadding(o_data, tokens);
  CheckTensor("qkv_data", *qkv_data.operator->(), type, device_, {tokens, heads, dim});
  CheckTensor("o_data", *o_data.operator->(), type, device_, {tokens, config_.num_qo_heads, dim});
  if (mask.has_value()) PlanMask(layer, *mask);
  const auto attend = [&](TokenHeads q, TokenHeads to) {
    mask.has_value() ? AttendMasked(layer, sm_scale, q, to) : Attend(layer, sm_scale, q, to);
  };
  const TokenHeads o{DataOf(*o_data.operator->()), config_.num_qo_heads * dim, dim};
  char* data = static_cast<char*>(DataOf(*qkv_data.operator->()));
  const auto head = [&](int64_t first) {
    return TokenHeads{data + first * dim * (type.bits / 8), heads * dim, dim};
  };
  if (split_rotary_.has_value()) {
    const auto view = [&](const Tensor& whole, int64_t n) {
      return whole.CreateView({launched, n, dim}, type);
    };
    const auto of_tokens = [&](const Tensor& positions) {
      return positions.CreateView({launched}, {kDLInt, 32, 1});
    };
    Tensor q = view(rotated_q_, config_.num_qo_heads);
    Tensor k = view(rotated_k_, config_.num_kv_heads);
    Tensor v = view(split_v_, config_.num_kv_heads);
    Tensor qkv = padded_qkv.CreateView({launched, heads, dim}, type);
    if (layout_.splits()) {
      DLTensor twins = *q.operator->();
      twins.data =
          static_cast<char*>(DataOf(twins)) + tokens * config_.num_qo_heads * dim * type.bits / 8;
      Rotate(qkv, of_tokens(runner_->Positions()), &twins, k, v);
    }
    Rotate(qkv, of_tokens(runner_->Origins()), q, k, v);
    const auto operand = [&](const Tensor& t, int64_t n) {
      return TokenHeads{DataOf(*t.operator->()), n * dim, dim};
    };
    TokenHeads rotated = operand(q, config_.num_qo_heads);
    const TokenHeads keys =
        stores_rotated() ? operand(k, config_.num_kv_heads) : head(config_.num_qo_heads);
    Append(layer, &rotated, keys, operand(v, config_.num_kv_heads), launched);
    attend(rotated, o);
    return;
  }
  TokenHeads q = head(0);
  Append(layer, &q, head(config_.num_qo_heads), head(config_.num_qo_heads + config_.num_kv_heads),
         launched);
  attend(q, o);
}

void KVCacheObj::Attention(int64_t layer_id, double sm_scale, const DLTensor& q, const DLTensor& k,
                           const DLTensor& v, const DLTensor& o, bool head_major) {
  const int32_t layer = CheckStep(layer_id);
  TVM_FLASHINFER_CHECK(!split_rotary_.has_value(), NotImplementedError)
      << "this cache rotates with the model's own function, which takes fused QKV: call "
      << "attention_with_fused_qkv";
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const int64_t tokens = layout_.num_tokens();
  const auto operand = [&](const char* name, const DLTensor& t, int64_t heads, int64_t dim,
                           bool by_head) -> TokenHeads {
    if (by_head) {
      CheckTensor(name, t, type, device_, {heads, tokens, dim});
      return {DataOf(t), dim, tokens * dim};
    }
    CheckTensor(name, t, type, device_, {tokens, heads, dim});
    return {DataOf(t), heads * dim, dim};
  };
  TokenHeads q_in = operand("q", q, config_.num_qo_heads, config_.head_dim_qk, head_major);
  const TokenHeads k_in = operand("k", k, config_.num_kv_heads, config_.head_dim_qk, head_major);
  const TokenHeads v_in = operand("v", v, config_.num_kv_heads, config_.head_dim_vo, head_major);
  const TokenHeads out = operand("o", o, config_.num_qo_heads, config_.head_dim_vo, false);
  Append(layer, &q_in, k_in, v_in, tokens);
  Attend(layer, sm_scale, q_in, out);
}

void KVCacheObj::AttentionViews(int64_t layer_id, double sm_scale, const Shape& views,
                                const DLTensor& q, const DLTensor& k, const DLTensor& v,
                                const DLTensor& o, tvm::ffi::PackedArgs values) {
  const int32_t layer = CheckStep(layer_id);
  TVM_FLASHINFER_CHECK(!split_rotary_.has_value(), NotImplementedError)
      << "this cache rotates with the model's own function, which takes fused QKV: call "
      << "attention_with_fused_qkv";
  TVM_FLASHINFER_CHECK(views.size() == 9, ValueError)
      << "argument `views` has " << views.size() << " entries, expected 9: first element, distance "
      << "of heads and distance of tokens, of q, k and v";
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const int64_t tokens = std::max<int64_t>(layout_.num_tokens(), o.ndim == 3 ? o.shape[0] : 0);
  const int64_t launched = LaunchedTokens(o);
  const auto operand = [&](const char* name, const DLTensor& t, int64_t heads, int64_t dim,
                           int index) -> TokenHeads {
    CheckContiguous(name, t, type, device_);
    const int64_t first = views[3 * index], head = views[3 * index + 1],
                  token = views[3 * index + 2];
    int64_t elements = 1;
    for (int i = 0; i < t.ndim; ++i) elements *= t.shape[i];
    const int64_t last = first + (heads - 1) * head + (tokens - 1) * token + dim;
    TVM_FLASHINFER_CHECK(first >= 0 && head >= 0 && token >= 0 && (tokens == 0 || last <= elements),
                         ValueError)
        << "argument `" << name << "` of shape " << ShapeString(t) << " has " << elements
        << " elements, its view of " << tokens << " tokens and " << heads << " heads ends at "
        << last;
    return {static_cast<char*>(DataOf(t)) + first * (type.bits / 8), token, head};
  };
  TokenHeads q_in = operand("q", q, config_.num_qo_heads, config_.head_dim_qk, 0);
  const TokenHeads k_in = operand("k", k, config_.num_kv_heads, config_.head_dim_qk, 1);
  const TokenHeads v_in = operand("v", v, config_.num_kv_heads, config_.head_dim_vo, 2);
  CheckTensor("o", o, type, device_, {tokens, config_.num_qo_heads, config_.head_dim_vo});
  if (values.size() > 0) BindVariant(layer, values);
  const int64_t vo = config_.head_dim_vo;
  Append(layer, &q_in, k_in, v_in, launched);
  Attend(layer, sm_scale, q_in, {DataOf(o), config_.num_qo_heads * vo, vo});
}

void KVCacheObj::AttentionWithSharedKV(int64_t source_layer_id, Tensor q_data,
                                       Tensor current_k_data, Tensor current_v_data, Tensor o_data,
                                       double sm_scale) {
  const int32_t layer = CheckStep(source_layer_id);
  TVM_FLASHINFER_CHECK(!layout_.splits(), NotImplementedError)
      << "attention_with_shared_kv over a window that has slid away from its sink: the query would "
      << "need a rotation for each";
  const DLDataType type = ToDLDataType(kernel_->q_type);
  const int64_t tokens = layout_.num_tokens();
  const int64_t qk = config_.head_dim_qk, vo = config_.head_dim_vo;
  const int64_t qo_heads = config_.num_qo_heads, kv_heads = config_.num_kv_heads;
  CheckTensor("q_data", *q_data.operator->(), type, device_, {tokens, qo_heads, qk});
  CheckTensor("current_k_data", *current_k_data.operator->(), type, device_,
              {tokens, kv_heads, qk});
  CheckTensor("current_v_data", *current_v_data.operator->(), type, device_,
              {tokens, kv_heads, vo});
  CheckTensor("o_data", *o_data.operator->(), type, device_, {tokens, qo_heads, vo});
  // The source layer has appended the current keys and values: the pool holds all there is.
  Attend(layer, sm_scale, {DataOf(*q_data.operator->()), qo_heads * qk, qk},
         {DataOf(*o_data.operator->()), qo_heads * vo, vo});
}

tvm::ffi::Array<Tensor> KVCacheObj::MergeAttnOutputInplace(Tensor o_self_attn, Tensor lse_self_attn,
                                                           Tensor o_cross_attn,
                                                           Tensor lse_cross_attn) {
  const DLTensor& o = *o_self_attn.operator->();
  TVM_FLASHINFER_CHECK(o.ndim >= 3, ValueError)
      << "argument `o_self_attn` has " << o.ndim << " axes, expected (tokens, heads, dim)";
  const int64_t heads = o.shape[o.ndim - 2], dim = o.shape[o.ndim - 1];
  int64_t tokens = 1;
  for (int axis = 0; axis < o.ndim - 2; ++axis) tokens *= o.shape[axis];
  const DLDataType type = ToDLDataType(kernel_->q_type), f32{kDLFloat, 32, 1};
  CheckTensor("o_self_attn", o, type, device_, {tokens, heads, dim});
  CheckTensor("lse_self_attn", *lse_self_attn.operator->(), f32, device_, {tokens, heads});
  CheckTensor("o_cross_attn", *o_cross_attn.operator->(), type, device_, {tokens, heads, dim});
  CheckTensor("lse_cross_attn", *lse_cross_attn.operator->(), f32, device_, {tokens, heads});
  const auto lse = [](const Tensor& t) { return static_cast<float*>(DataOf(*t.operator->())); };
  runner_->Merge({DataOf(o), DataOf(*o_cross_attn.operator->()), lse(lse_self_attn),
                  lse(lse_cross_attn), TokenHeads{DataOf(o), heads * dim, dim}, lse(lse_self_attn),
                  static_cast<int32_t>(tokens), static_cast<int32_t>(heads),
                  static_cast<int32_t>(dim)});
  // Relax doesn't know that the results are the arguments: it may plan the memory of those anew
  // while the results are still to be read. So they are copies.
  const auto copy = [&](const Tensor& t) {
    Tensor result = Tensor::Empty(t.Shape(), t->dtype, t->device);
    t.CopyTo(result);
    return result;
  };
  return {copy(o_self_attn), copy(lse_self_attn)};
}

void KVCacheObj::Append(int32_t layer, TokenHeads* q, TokenHeads k, TokenHeads v,
                        int64_t num_tokens) {
  StepRunner* runner = RunnerOf(layer);
  if (!runner->has_variant()) call_variant_.Get(*KernelOf(layer));  // throws: none is bound
  runner->Append({layers_[layer].k, layers_[layer].v, k_strides_, v_strides_}, q, k, v,
                 static_cast<int32_t>(num_tokens));
  layer_states_[layer].stored = true;
  if (!step_sends_.empty()) SendStored(layer);
}

AttentionParams KVCacheObj::Operands(int32_t layer, const StepLayout& layout, double sm_scale,
                                     TokenHeads q, TokenHeads o) const {
  AttentionParams params{};
  params.q = q.data;
  params.k = layers_[layer].k;
  params.v = layers_[layer].v;
  params.o = o.data;
  params.q_token_stride = q.token_stride;
  params.q_head_stride = q.head_stride;
  params.o_token_stride = o.token_stride;
  params.o_head_stride = o.head_stride;
  params.k_strides = k_strides_;
  params.v_strides = v_strides_;
  params.page_size = config_.page_size;
  if (layout.by_token()) {  // blocks of one token, numbered in token strides
    params.page_size = 1;
    params.k_strides.page = k_strides_.token;
    params.v_strides.page = v_strides_.token;
  }
  params.num_qo_heads = config_.num_qo_heads;
  params.num_kv_heads = config_.num_kv_heads;
  params.sm_scale = static_cast<float>(sm_scale);
  return params;
}

void KVCacheObj::Attend(int32_t layer, double sm_scale, TokenHeads q, TokenHeads o) {
  StepRunner* runner = RunnerOf(layer);
  if (layout_.splits()) return AttendTwins(layer, layout_, runner, sm_scale, q, o);
  AttentionParams params = Operands(layer, layout_, sm_scale, q, o);
  params.variant_params = runner->variant_args();
  runner->Attend(&params);
}

void KVCacheObj::AttendMasked(int32_t layer, double sm_scale, TokenHeads q, TokenHeads o) {
  if (masked_layout_.splits()) {
    return AttendTwins(layer, masked_layout_, masked_.get(), sm_scale, q, o);
  }
  AttentionParams params = Operands(layer, masked_layout_, sm_scale, q, o);
  params.variant_params = masked_->variant_args();
  masked_->Attend(&params);
}

void KVCacheObj::AttendTwins(int32_t layer, const StepLayout& layout, StepRunner* runner,
                             double sm_scale, TokenHeads q, TokenHeads o) {
  const int64_t tokens = layout.num_tokens(), heads = config_.num_qo_heads;
  const int64_t dim = config_.head_dim_vo;
  AttentionParams params =
      Operands(layer, layout, sm_scale, q, {DataOf(*twin_o_.operator->()), heads * dim, dim});
  params.lse = static_cast<float*>(DataOf(*twin_lse_.operator->()));
  params.variant_params = runner->variant_args();
  runner->Attend(&params);
  const char* states = static_cast<const char*>(DataOf(*twin_o_.operator->()));
  float* lse = params.lse;
  runner->Merge({states, states + tokens * heads * dim * twin_o_->dtype.bits / 8, lse,
                 lse + tokens * heads, o, lse, static_cast<int32_t>(tokens),
                 static_cast<int32_t>(heads), static_cast<int32_t>(dim)});
}

}  // namespace tvm_flashinfer
