// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The mask argument of attention with fused QKV: which of a step's tokens see which, in place of
// causality. Like a token tree it is a layout by token: every query is a row of the tokens that it
// sees.
#include <cstring>
#include <utility>

#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

void KVCacheObj::PlanMask(int32_t layer, const Tensor& mask) {
  TVM_FLASHINFER_CHECK(!has_variant_, ValueError)
      << "argument `mask`: this cache has a variant, which brings its own mask";
  TVM_FLASHINFER_CHECK(GroupOf(layer) == nullptr, ValueError)
      << "argument `mask`: layer " << layer + config_.layer_begin << " has a window, which a mask "
      << "takes the place of";
  TVM_FLASHINFER_CHECK(!layout_.splits(), ValueError)
      << "argument `mask` in a step over rotated keys behind a slid window: the query would need "
      << "two rotations";
  for (const AppendRequest& r : requests_) {
    TVM_FLASHINFER_CHECK(r.tree == nullptr, ValueError)
        << "argument `mask` in a step with token trees: they say already what a token sees";
  }
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
  if (mask_planned_ && visible == mask_) return;  // layers share their mask as a rule
  if (masked_ == nullptr) masked_ = StepRunner::Make(config_, kernel_, device_, std::nullopt);
  mask_planned_ = false;
  masked_layout_.BuildMasked(requests_, page_indptr_, page_ids_, visible);
  masked_->Plan(&masked_layout_);
  masked_->Begin(masked_layout_);
  mask_ = std::move(visible);
  mask_planned_ = true;
}

}  // namespace tvm_flashinfer
