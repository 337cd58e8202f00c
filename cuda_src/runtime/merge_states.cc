// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// `tvm_flashinfer.merge_states(o_a, lse_a, o_b, lse_b, o, lse[, kernel])`: the state of the union
// of two disjoint sets of keys. FlashInfer, MLSys 2025, section 2.2. The outputs may be the inputs
// `a`. On a GPU `kernel` is the factory of any CUDA kernel table with outputs of their dtype.
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/c_backend_api.h>
#include <tvm_flashinfer/dtype.h>
#include <tvm_flashinfer/state.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "batch_attention_check.h"
#include "check.h"
#include "cuda_plan.h"
#include "kernel_handle.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

using tvm::ffi::Any;
using tvm::ffi::PackedArgs;

/*! The operands of a merge: outputs strided over (token, head), LSE [token, head] contiguous. */
struct Merge {
  TokenView o_a, o_b, o;
  const float *lse_a, *lse_b;
  float* lse;
  int64_t tokens, heads, dim;
};

template <typename T>
void MergeTokens(const Merge& m, int64_t begin, int64_t end) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const auto row = [](const TokenView& view, int64_t token, int64_t head) {
    return reinterpret_cast<T*>(view.data) + token * view.token_stride + head * view.head_stride;
  };
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < m.heads; ++head) {
      const int64_t at = token * m.heads + head;
      const float lse_a = m.lse_a[at], lse_b = m.lse_b[at];
      const float max = std::fmax(lse_a, lse_b);
      // An absent set of keys has weight 0 whatever its output holds.
      const float weight_a = lse_a == kNone ? 0.0f : std::exp(lse_a - max);
      const float weight_b = lse_b == kNone ? 0.0f : std::exp(lse_b - max);
      const float sum = weight_a + weight_b;
      const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
      const T* a = row(m.o_a, token, head);
      const T* b = row(m.o_b, token, head);
      T* o = row(m.o, token, head);
      for (int64_t d = 0; d < m.dim; ++d) {
        float value = 0.0f;
        if (lse_a != kNone) value += weight_a * scale * ToFloat(a[d]);
        if (lse_b != kNone) value += weight_b * scale * ToFloat(b[d]);
        o[d] = FromFloat<T>(value);
      }
      m.lse[at] = sum == 0.0f ? kNone : max + std::log(sum);
    }
  }
}

template <typename T>
void MergeOnPool(const Merge& m) {
  // Below this many elements a thread, waking it costs more than its share.
  constexpr int64_t kElements = 1 << 14;
  if (m.tokens * m.heads * m.dim <= kElements) return MergeTokens<T>(m, 0, m.tokens);
  const auto body = [](int task, TVMParallelGroupEnv* env, void* data) {
    const auto& all = *static_cast<const Merge*>(data);
    const int64_t share = (all.tokens + env->num_task - 1) / env->num_task;
    MergeTokens<T>(all, std::min(all.tokens, task * share),
                   std::min(all.tokens, (task + 1) * share));
    return 0;
  };
  const int status = TVMBackendParallelLaunch(body, const_cast<Merge*>(&m), 0);
  TVM_FLASHINFER_CHECK(status == 0, RuntimeError) << "TVM's thread pool could not merge states";
}

void MergeOnDevice(const Merge& m, const KernelHandle& kernel, DLDataType type, DLDevice device) {
  TVM_FLASHINFER_CHECK(
      kernel.device_type() == device.device_type && ToDLDataType(kernel->q_type) == type,
      ValueError)
      << "argument `kernel` was compiled for outputs of dtype "
      << tvm::ffi::DLDataTypeToString(ToDLDataType(kernel->q_type)) << " on device type "
      << static_cast<int>(kernel.device_type()) << ", `o_a` has "
      << tvm::ffi::DLDataTypeToString(type) << " on " << static_cast<int>(device.device_type);
  TVM_FLASHINFER_CHECK(m.tokens * m.heads <= INT32_MAX, ValueError)
      << "argument `o_a` has " << m.tokens << " tokens of " << m.heads
      << " heads, at most 2^31 - 1 states are merged at once";
  CudaMergeParams params{};
  const auto put = [](const TokenView& view, auto* data, int64_t* token, int64_t* head) {
    *data = view.data;
    *token = view.token_stride;
    *head = view.head_stride;
  };
  put(m.o_a, &params.o_a, &params.o_a_token_stride, &params.o_a_head_stride);
  put(m.o_b, &params.o_b, &params.o_b_token_stride, &params.o_b_head_stride);
  put(m.o, &params.o, &params.o_token_stride, &params.o_head_stride);
  params.lse_a = m.lse_a;
  params.lse_b = m.lse_b;
  params.lse = m.lse;
  params.num_tokens = static_cast<int32_t>(m.tokens);
  params.num_heads = static_cast<int32_t>(m.heads);
  params.dim = static_cast<int32_t>(m.dim);
  CheckCuda(kernel.cuda().merge(&params, CurrentStream(device)), "merging attention states");
}

void MergeStatesPacked(PackedArgs args, Any*) {
  TVM_FLASHINFER_CHECK(args.size() == 6 || args.size() == 7, TypeError)
      << "merge_states takes o_a, lse_a, o_b, lse_b, o, lse and, on a GPU, a kernel; "
      << args.size() << " arguments were given";
  const auto operand = [&](int i) { return args[i].cast<TensorView>(); };
  const TensorView o_a = operand(0), lse_a = operand(1), o_b = operand(2), lse_b = operand(3);
  const TensorView o = operand(4), lse = operand(5);
  TVM_FLASHINFER_CHECK(o_a.ndim() >= 3, ValueError)
      << "argument `o_a` has " << o_a.ndim() << " axes, expected (tokens, heads, dim)";
  Merge m;
  m.dim = o_a.size(-1);
  m.heads = o_a.size(-2);
  m.tokens = 1;
  for (int axis = 0; axis < o_a.ndim() - 2; ++axis) m.tokens *= o_a.size(axis);
  const DLDataType type = o_a.dtype();
  const bool is_float = type.code == kDLFloat && (type.bits == 32 || type.bits == 16);
  const bool is_bfloat = type.code == kDLBfloat && type.bits == 16;
  TVM_FLASHINFER_CHECK((is_float || is_bfloat) && type.lanes == 1, TypeError)
      << "argument `o_a` has dtype " << tvm::ffi::DLDataTypeToString(type)
      << ", expected float32, float16 or bfloat16";
  std::optional<KernelHandle> kernel;
  if (args.size() == 7) kernel.emplace(args[6].cast<tvm::ffi::Function>());
  const DLDevice cpu{kDLCPU, 0}, device = kernel.has_value() ? o_a.device() : cpu;
  m.o_a = CheckTokens({"o_a"}, o_a, type, m.tokens, m.heads, m.dim, false, device);
  m.lse_a = CheckLse({"lse_a"}, lse_a, m.tokens, m.heads, device);
  m.o_b = CheckTokens({"o_b"}, o_b, type, m.tokens, m.heads, m.dim, false, device);
  m.lse_b = CheckLse({"lse_b"}, lse_b, m.tokens, m.heads, device);
  m.o = CheckTokens({"out"}, o, type, m.tokens, m.heads, m.dim, true, device);
  m.lse = CheckLse({"lse"}, lse, m.tokens, m.heads, device);
  if (kernel.has_value()) return MergeOnDevice(m, *kernel, type, device);
  if (is_bfloat) return MergeOnPool<BFloat16>(m);
  if (type.bits == 16) return MergeOnPool<Float16>(m);
  MergeOnPool<float>(m);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def_packed("tvm_flashinfer.merge_states", MergeStatesPacked);
}

}  // namespace
}  // namespace tvm_flashinfer
