// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Packed functions of BatchAttention. Outputs come last, so that R.call_dps_packed may call them.
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <string>

#include "batch_attention.h"
#include "check.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::Shape;
using tvm::ffi::Tensor;

int32_t Extent(const char* name, const Shape& shape, size_t index, int64_t low,
               int64_t high = INT32_MAX / 2) {
  const int64_t value = shape[index];
  TVM_FLASHINFER_CHECK(value >= low && value <= high, ValueError)
      << "argument `" << name << "` is " << value << ", expected a value in [" << low << ", "
      << high << "]";
  return static_cast<int32_t>(value);
}

void CheckSize(const char* name, const Shape& shape, size_t size, const char* entries) {
  TVM_FLASHINFER_CHECK(shape.size() == size, ValueError)
      << "argument `" << name << "` has " << shape.size() << " entries, expected " << size << ": "
      << entries;
}

BatchAttention Create(Function kernel, Shape bounds, Shape heads, std::string kv_layout,
                      int64_t device_id) {
  CheckSize("bounds", bounds, 7,
            "max_requests, max_q_tokens, max_kv_pages, max_levels, num_workers, max_splits, "
            "max_fixed_chunks");
  CheckSize("heads", heads, 4, "num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo");
  BatchAttentionConfig config;
  config.bounds.max_requests = Extent("max_requests", bounds, 0, 1);
  config.bounds.max_q_tokens = Extent("max_q_tokens", bounds, 1, 1);
  config.bounds.max_kv_pages = Extent("max_kv_pages", bounds, 2, 0);
  config.bounds.max_levels = Extent("max_levels", bounds, 3, 1, 64);
  config.bounds.num_workers = Extent("num_workers", bounds, 4, 0, 65536);
  config.bounds.max_splits = Extent("max_splits", bounds, 5, 1, 1024);
  config.bounds.max_fixed_chunks = Extent("max_fixed_chunks", bounds, 6, 0, 1 << 20);
  config.num_qo_heads = Extent("num_qo_heads", heads, 0, 1, 1 << 16);
  config.num_kv_heads = Extent("num_kv_heads", heads, 1, 1, 1 << 16);
  config.head_dim_qk = Extent("head_dim_qk", heads, 2, 1, 1 << 16);
  config.head_dim_vo = Extent("head_dim_vo", heads, 3, 1, 1 << 16);
  TVM_FLASHINFER_CHECK(config.num_qo_heads % config.num_kv_heads == 0, ValueError)
      << "argument `num_qo_heads` is " << config.num_qo_heads
      << ", expected a multiple of num_kv_heads, " << config.num_kv_heads;
  TVM_FLASHINFER_CHECK(kv_layout == "NHD" || kv_layout == "HND", ValueError)
      << "argument `kv_layout` is \"" << kv_layout << "\", expected \"NHD\" or \"HND\"";
  config.order = kv_layout == "NHD" ? PoolOrder::kNHD : PoolOrder::kHND;
  KernelHandle handle(std::move(kernel));
  TVM_FLASHINFER_CHECK(device_id >= 0 && device_id < 64, ValueError)
      << "argument `device_id` is " << device_id << ", expected a value in [0, 63]";
  config.device = {handle.device_type(), static_cast<int32_t>(device_id)};
  const auto check_kernel = [](const char* what, int32_t compiled, int32_t asked) {
    TVM_FLASHINFER_CHECK(compiled == asked, ValueError)
        << "argument `kernel` was compiled for " << what << " " << compiled << ", expected "
        << asked;
  };
  check_kernel("head_dim_qk", handle->head_dim_qk, config.head_dim_qk);
  check_kernel("head_dim_vo", handle->head_dim_vo, config.head_dim_vo);
  return BatchAttention(tvm::ffi::make_object<BatchAttentionObj>(config, std::move(handle)));
}

BatchAttentionObj* Get(const BatchAttention& self) {
  return const_cast<BatchAttentionObj*>(self.get());
}

void Plan(BatchAttention self, TensorView qo_indptr, TensorView kv_len, Array<LevelTensors> levels,
          int64_t page_size, Optional<TensorView> q_position, int64_t fixed_chunk,
          bool per_worker_queues) {
  Get(self)->Plan({qo_indptr, kv_len, std::move(levels), page_size, q_position, fixed_chunk,
                   per_worker_queues});
}

void SetParams(BatchAttention self, Array<tvm::ffi::Any> values) { Get(self)->SetParams(values); }

void Run(BatchAttention self, TensorView q, TensorView k, Optional<TensorView> v, double sm_scale,
         TensorView o) {
  Get(self)->Run(q, {k, v}, sm_scale, o, std::nullopt);
}

void RunWithLse(BatchAttention self, TensorView q, TensorView k, Optional<TensorView> v,
                double sm_scale, TensorView o, TensorView lse) {
  Get(self)->Run(q, {k, v}, sm_scale, o, lse);
}

void Append(BatchAttention self, TensorView k_new, TensorView v_new, TensorView slots, TensorView k,
            Optional<TensorView> v, Optional<TensorView> positions) {
  Get(self)->Append(k_new, v_new, slots, {k, v}, positions);
}

Tensor Section(BatchAttention self, std::string name) { return Get(self)->Section(name); }

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("tvm_flashinfer.batch_attention_create", Create)
      .def("tvm_flashinfer.batch_attention_plan", Plan)
      .def("tvm_flashinfer.batch_attention_set_params", SetParams)
      .def("tvm_flashinfer.batch_attention_run", Run)
      .def("tvm_flashinfer.batch_attention_run_with_lse", RunWithLse)
      .def("tvm_flashinfer.batch_attention_append", Append)
      .def("tvm_flashinfer.batch_attention_section", Section);
}

}  // namespace
}  // namespace tvm_flashinfer
