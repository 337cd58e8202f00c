// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The mask argument of attention with fused QKV: which of a step's tokens see which, in place of
// causality. Like a token tree it is a layout by token: every query is a row of the tokens that it
// sees. So whatever else hides tokens, a window or a token tree, is part of the same layout.
#include <cstring>
#include <utility>

#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

void KVCacheObj::PlanMask(int32_t layer, const Tensor& mask) {
  TVM_FLASHINFER_CHECK(!has_variant_ || variant_ignores_positions_, ValueError)
      << "argument `mask`: this cache has a variant that knows where tokens stand, or a mask of "
         "its "
      << "own, and a mask leaves neither";
  const LayerGroup* group = GroupOf(layer);
  TVM_FLASHINFER_CHECK(group == nullptr || group->windowed_only, ValueError)
      << "argument `mask`: layer " << layer + config_.layer_begin << " has a kernel of its own";
  const int32_t window = group == nullptr ? 0 : group->runner->window();
  int64_t entries = 0;
  for (const AppendRequest& r : requests_) entries += int64_t{r.count} * r.count;
  const DLDataType type = mask->dtype;
  const bool is_byte = type.bits == 8 && type.lanes == 1 &&
                       (type.code == kDLBool || type.code == kDLInt || type.code == kDLUInt);
  TVM_FLASHINFER_CHECK(is_byte, TypeError)
      << "argument `mask` has dtype " << tvm::ffi::DLDataTypeToString(type)
      << ", expected bool, int8 or uint8";
  TVM_FLASHINFER_CHECK(mask->ndim == 1 && mask->shape[0] == entries, ValueError)
      << "argument `mask` has shape " << ShapeString(*mask.operator->()) << ", expected ["
      << entries << "]: a matrix (new tokens, new tokens) for each sequence of the step";
  TVM_FLASHINFER_CHECK(tvm::ffi::IsContiguous(*mask.operator->()), ValueError)
      << "argument `mask` is not contiguous";
  std::vector<uint8_t> visible(entries);
  if (entries > 0) {
    Tensor host = mask;
    if (mask->device.device_type != kDLCPU) {
      host = Tensor::Empty(mask.Shape(), type, {kDLCPU, 0});
      host.CopyFrom(mask);
    }
    std::memcpy(visible.data(), DataOf(*host.operator->()), entries);
  }
  // Layers share their mask as a rule.
  if (mask_planned_ && visible == mask_ && window == mask_window_) return;
  if (masked_ == nullptr) {
    masked_ = StepRunner::Make(config_, kernel_, device_, std::nullopt);
    if (has_variant_) masked_->UseVariant(*runner_->variant_args());
  }
  mask_planned_ = false;
  masked_layout_.BuildMasked(requests_, page_indptr_, page_ids_, visible, window, stores_rotated());
  masked_->Plan(&masked_layout_);
  masked_->Begin(masked_layout_);
  mask_ = std::move(visible);
  mask_window_ = window;
  mask_planned_ = true;
}

}  // namespace tvm_flashinfer
