// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "batch_backend_cuda.h"

#include <algorithm>
#include <cstring>

#include "check.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::runtime::Tensor;

CudaBatchBackend::CudaBatchBackend(const BatchAttentionConfig& config, const KernelHandle& kernel)
    : config_(config),
      kernel_(kernel),
      parts_(HeadParts(kernel_.cuda(), config.num_qo_heads, config.num_kv_heads)),
      append_stagings_(kernel_.cuda()) {
  const int64_t bytes = config.bounds.max_q_tokens * int64_t{sizeof(int64_t) + sizeof(int32_t)};
  append_ = Tensor::Empty({bytes}, {kDLUInt, 8, 1}, config.device);
  plan_ = PlanOf(0);
}

CudaPlan* CudaBatchBackend::PlanOf(int tile) {
  std::unique_ptr<CudaPlan>& plan = plans_[tile];
  if (plan == nullptr) {
    const int32_t rows = cuda().tiles[tile];
    PlanBounds bounds = config_.bounds;
    bounds.num_kv_heads = config_.num_kv_heads * parts_;
    bounds.max_tile_tokens =
        std::max(1, rows / (config_.num_qo_heads / config_.num_kv_heads / parts_));
    CheckPlanSize(bounds);
    plan =
        std::make_unique<CudaPlan>(cuda(), bounds, rows, config_.num_qo_heads, 0, config_.device);
  }
  return plan.get();
}

void CudaBatchBackend::Plan(ScheduleInput* in, bool) {
  in->group = config_.num_qo_heads / config_.num_kv_heads / parts_;
  int tile = ChooseTile(cuda(), *in);
  if (in->fixed_chunk > 0) {  // a request's result must not depend on its batch: one tile for all
    tile = 0;
    while (cuda().tiles[tile] < in->group) ++tile;
  }
  in->tile_tokens = std::max(1, cuda().tiles[tile] / in->group);
  in->min_chunk = 64;
  SetTileCosts(cuda(), tile, in);
  int64_t pages = 0;
  for (int32_t l = 0; l < in->num_levels; ++l) {
    pages += in->levels[l].kv_indptr[in->levels[l].num_rows];
  }
  CudaPlan* plan = PlanOf(tile);
  plan->Make(*in, pages);
  plan->Send(CurrentStream(config_.device));
  plan_ = plan;
}

void CudaBatchBackend::Run(AttentionParams* params) {
  plan_->Describe(params);
  if (parts_ > 1) {
    params->num_kv_heads = parts_;
    params->k_strides.head = params->v_strides.head = 0;
  }
  const char* error = cuda().run(params, plan_->tile_rows(), plan_->bounds().num_workers,
                                 CurrentStream(config_.device));
  TVM_FLASHINFER_CHECK(error == nullptr, ValueError) << "attention on a CUDA device: " << error;
}

void CudaBatchBackend::Append(const BatchAppend& append) {
  void* stream = CurrentStream(config_.device);
  const int64_t slot_bytes = append.num_tokens * int64_t{sizeof(int64_t)};
  const int64_t position_bytes =
      append.positions == nullptr ? 0 : append.num_tokens * int64_t{sizeof(int32_t)};
  if (append.num_tokens == 0) return;
  char* staging = append_stagings_.Acquire(slot_bytes + position_bytes);
  std::memcpy(staging, append.slots, slot_bytes);
  if (position_bytes > 0) std::memcpy(staging + slot_bytes, append.positions, position_bytes);
  append_stagings_.Use();
  char* device = static_cast<char*>(DataOf(*append_.operator->()));
  append_stagings_.current().Send(device, slot_bytes + position_bytes, stream);
  CudaAppendParams params{};
  params.k = append.k_new.data;
  params.k_token_stride = append.k_new.token_stride;
  params.k_head_stride = append.k_new.head_stride;
  params.v = append.v_new.data;
  params.v_token_stride = append.v_new.token_stride;
  params.v_head_stride = append.v_new.head_stride;
  params.k_pool = append.k.data;
  params.v_pool = append.v.data;
  params.k_strides = append.k.strides;
  params.v_strides = append.v.strides;
  params.slots = reinterpret_cast<const int64_t*>(device);
  if (position_bytes > 0) params.positions = reinterpret_cast<const int32_t*>(device + slot_bytes);
  params.variant_params = append.variant;
  params.num_qo_heads = config_.num_qo_heads;
  params.num_kv_heads = config_.num_kv_heads;
  params.page_size = static_cast<int32_t>(append.k.page_size);
  CheckCuda(cuda().append(&params, append.num_tokens, stream), "storing keys and values");
}

}  // namespace tvm_flashinfer
