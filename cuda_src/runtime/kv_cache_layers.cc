// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What layers differ in: variants and their parameters, windows, rotations.
#include <tvm_flashinfer/variant.h>

#include <utility>

#include "check.h"
#include "kv_cache.h"

namespace tvm_flashinfer {

using tvm::ffi::AnyView;
using tvm::ffi::PackedArgs;

void KVCacheObj::UseLayers(const Shape& layers, KernelHandle kernel, int32_t window,
                           std::optional<RopeConfig> rope) {
  TVM_FLASHINFER_CHECK(!config_.sliding_window && !config_.mla, ValueError)
      << "layers of their own in a cache made with support_sliding_window 1 or of latent attention "
      << "(mla): its layers are alike";
  TVM_FLASHINFER_CHECK(!rope_table_.defined(), ValueError)
      << "layers of their own in a cache whose kernels rotate keys already: give it the layers "
         "first";
  TVM_FLASHINFER_CHECK(window >= 0, ValueError)
      << "window is " << window << ", expected at least 0";
  TVM_FLASHINFER_CHECK(
      kernel.device_type() == device_.device_type && kernel->q_type == kernel_->q_type &&
          kernel->kv_type == kernel_->kv_type && kernel->head_dim_qk == kernel_->head_dim_qk &&
          kernel->head_dim_vo == kernel_->head_dim_vo && kernel->causal != 0,
      ValueError)
      << "argument `kernel` was not compiled for this cache's device, dtypes and head sizes, and a "
      << "variant that is proven to hide the keys after a query";
  TVM_FLASHINFER_CHECK(
      window == 0 || (kernel->num_params > 0 && kernel->params[0].type == VariantType::kInt32 &&
                      kernel->params[0].num_dims == 0),
      ValueError)
      << "argument `kernel` has a variant whose first parameter isn't an int32, the tokens that a "
      << "query sees before itself";
  auto runner = StepRunner::Make(config_, kernel, device_, std::move(rope));
  if (window > 0) runner->UseWindow(window);
  if (group_of_.empty()) group_of_.assign(config_.num_layers(), -1);
  for (const int64_t layer : layers) {
    if (layer < config_.layer_begin || layer >= config_.layer_end) continue;  // another stage's
    group_of_[layer - config_.layer_begin] = static_cast<int32_t>(groups_.size());
  }
  groups_.push_back({std::move(kernel), std::move(runner), {}, false});
}

void KVCacheObj::UseSlidingLayers(const Shape& layers, int32_t window, KernelHandle kernel) {
  TVM_FLASHINFER_CHECK(!config_.sliding_window, ValueError)
      << "support_sliding_window is 1 in a cache some of whose layers have a window of their own: "
      << "the others need whole sequences";
  TVM_FLASHINFER_CHECK(window > 0, ValueError) << "window is " << window << ", expected at least 1";
  TVM_FLASHINFER_CHECK(kernel->num_params == kernel_->num_params + 1, ValueError)
      << "argument `kernel` was not compiled for this cache's dtypes and head sizes, and a variant "
      << "whose first parameter is the tokens that a query sees before itself, and whose others "
      << "are those of the cache's own";
  UseLayers(layers, std::move(kernel), window, rope_config_);
  groups_.back().windowed_only = true;
}

const KVCacheObj::LayerGroup* KVCacheObj::GroupOf(int32_t layer) const {
  const int32_t group = group_of_.empty() ? -1 : group_of_[layer];
  return group < 0 ? nullptr : &groups_[group];
}

StepRunner* KVCacheObj::RunnerOf(int32_t layer) const {
  const LayerGroup* group = GroupOf(layer);
  return group != nullptr ? group->runner.get() : runner_.get();
}

const KernelHandle& KVCacheObj::KernelOf(int32_t layer) const {
  const LayerGroup* group = GroupOf(layer);
  return group != nullptr ? group->kernel : kernel_;
}

bool KVCacheObj::has_windows() const {
  for (const LayerGroup& group : groups_) {
    if (group.runner->window() > 0) return true;
  }
  return false;
}

VisitedRange KVCacheObj::EveryElement() const {
  VisitedRange range{};
  range.elements = {{0, config_.max_batch - 1},
                    {0, config_.max_total_seq_len - 1},
                    {0, config_.max_total_seq_len - 1},
                    {0, config_.num_qo_heads - 1},
                    {0, config_.num_kv_heads - 1}};
  range.q_rows = {0, config_.max_q_tokens() - 1};
  range.kv_slots = Interval::Any();  // places in the pool are the cache's own matter
  return range;
}

void KVCacheObj::UseVariant(const tvm::ffi::Array<tvm::ffi::Any>& values, bool ignores_positions,
                            bool merges) {
  TVM_FLASHINFER_CHECK(kernel_->causal != 0, ValueError)
      << "argument `kernel` has a variant that isn't proven to hide the keys after a query: a step "
      << "of a cache sees none";
  TVM_FLASHINFER_CHECK(!config_.mla || merges, NotImplementedError)
      << "a variant in a cache of latent attention, under which states of parts don't merge";
  TVM_FLASHINFER_CHECK(
      !self_kernel_.has_value() || (*self_kernel_)->num_params == kernel_->num_params, ValueError)
      << "the kernel of self_attention has a variant of another number of parameters than the "
      << "cache's " << kernel_->num_params << ": both have the same variant";
  TVM_FLASHINFER_CHECK(!config_.sliding_window || !stores_rotated(), NotImplementedError)
      << "a variant in a cache that rotates keys when it stores them and slides windows: a query "
         "is "
      << "attended in two parts there, whose states a variant may not allow to merge; a kernel "
         "that "
      << "rotates keys when it reads them can (kv_cache_with_rotating_kernel)";
  VisitedRange range = EveryElement();
  tvm::ffi::Array<tvm::ffi::Any> own = values;
  if (rope_table_.defined()) own.push_back(rope_table_);
  BoundVariantArgs bound;
  bound.Bind(*kernel_, own, device_);
  const VariantArgs args = *bound.Get(*kernel_, range, -1);
  range.stores = true;
  if (kernel_->stores != 0) bound.Get(*kernel_, range, -1);
  for (LayerGroup& group : groups_) {
    if (!group.windowed_only) continue;
    tvm::ffi::Array<tvm::ffi::Any> all{static_cast<int64_t>(group.runner->window() - 1)};
    for (const tvm::ffi::Any& value : own) all.push_back(value);
    group.variant.Bind(*group.kernel, all, device_);
    group.runner->UseVariant(*group.variant.Get(*group.kernel));
  }
  runner_->UseVariant(args);
  variant_ = bound;
  has_variant_ = true;
  variant_merges_ = merges;
  variant_ignores_positions_ = ignores_positions && !rope_table_.defined();
}

void KVCacheObj::BindVariant(int32_t layer, PackedArgs values) {
  const KernelHandle& kernel = KernelOf(layer);
  TVM_FLASHINFER_CHECK(kernel->causal != 0, ValueError)
      << "layer " << layer + config_.layer_begin << " has a variant that isn't proven to hide the "
      << "keys after a query: a step of a cache sees none";
  StepRunner* runner = RunnerOf(layer);
  AnyView all[VariantArgs::kMaxArgs];
  int32_t count = 0;
  if (runner->window() > 0) all[count++] = static_cast<int64_t>(runner->window() - 1);
  const int32_t rest = kernel->num_params - count - (rope_table_.defined() ? 1 : 0);
  TVM_FLASHINFER_CHECK(values.size() == rest, ValueError)
      << values.size() << " parameters of the variant of layer " << layer + config_.layer_begin
      << " were given, it declares " << rest;
  for (int32_t i = 0; i < values.size(); ++i) all[count++] = values[i];
  if (rope_table_.defined()) all[count++] = rope_table_;
  call_variant_.Bind(*kernel, PackedArgs(all, count), device_);
  runner->UseVariant(*call_variant_.Get(*kernel, EveryElement(), -1));
}

}  // namespace tvm_flashinfer
