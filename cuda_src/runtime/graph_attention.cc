// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// tvm_flashinfer.graph_attention: attention where InjectAttention put it. A plan depends on the
// lengths only, so it is made once per shape and shared by all layers; a repeated shape allocates
// nothing.
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <cmath>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "check.h"
#include "graph_plan.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Function;
using tvm::ffi::PackedArgs;
using tvm::ffi::Shape;

/*! Plans kept per thread; the one used longest ago goes first, unless a CUDA graph runs it. */
constexpr size_t kMaxPlans = 32;
constexpr int64_t kMaxExtent = int64_t{1} << 30;

/*! Element (b, h, t, d) lies at offset + b * batch + h * head + t * token + d, in elements. */
struct Strides {
  int64_t offset, batch, head, token;
};

/*!
 * The first factory that gave a kernel table, which stays as long as the process. Plans of the main
 * thread outlive an embedded interpreter, and a factory may be a callback of it.
 */
const Function& Keep(const void* table, const Function& factory) {
  static std::mutex mutex;
  static auto* kept = new std::unordered_map<const void*, Function>;  // never destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  return kept->emplace(table, factory).first->second;
}

/*! The calling thread's plan for a kernel and extents, most recently used first. */
GraphPlan& FindPlan(const Function& factory, const GraphExtents& extents, DLDevice device) {
  static thread_local std::list<std::unique_ptr<GraphPlan>> plans;
  const void* table = factory().cast<void*>();
  for (auto it = plans.begin(); it != plans.end(); ++it) {
    if (!(*it)->Serves(table, extents, device)) continue;
    plans.splice(plans.begin(), plans, it);
    return *plans.front();
  }
  auto made = GraphPlan::Make(Keep(table, factory), extents, device);
  size_t others = 0;
  for (auto it = plans.begin(); it != plans.end();) {
    const bool stays = (*it)->captured() || ++others < kMaxPlans;
    it = stays ? std::next(it) : plans.erase(it);
  }
  plans.push_front(std::move(made));
  return *plans.front();
}

/*! Check that an operand is what the kernel takes, and that no element lies outside it. */
GraphOperand CheckOperand(const char* name, const DLTensor& t, DLDataType dtype, DLDevice device,
                          const Strides& s, const GraphExtents& e, int64_t tokens, int64_t heads,
                          int64_t dim) {
  CheckContiguous(name, t, dtype, device);
  char* data = static_cast<char*>(DataOf(t));
  if (e.batch == 0 || tokens == 0) return {data, s.batch, s.head, s.token};
  int64_t elements = 1;
  for (int i = 0; i < t.ndim; ++i) elements *= t.shape[i];
  int64_t lo = s.offset, hi = s.offset + dim - 1;
  const int64_t reach[][2] = {{e.batch, s.batch}, {heads, s.head}, {tokens, s.token}};
  for (const auto& axis : reach) (axis[1] < 0 ? lo : hi) += (axis[0] - 1) * axis[1];
  TVM_FLASHINFER_CHECK(lo >= 0 && hi < elements, ValueError)
      << "argument `spec` reads elements " << lo << " to " << hi << " of argument `" << name
      << "`, which has " << elements;
  return {data + s.offset * (dtype.bits / 8), s.batch, s.head, s.token};
}

/*!
 * tvm_flashinfer.graph_attention(kernel, spec, sm_scale, q, k, v, *params, o)
 *
 * kernel: factory of the kernel table. spec: {batch, queries, keys, position of the first query,
 * query heads, KV heads, then offset and strides (batch, head, token) of q, k, v and o}.
 * params: the variant's. o is written; a query that sees no key gets 0.
 */
void GraphAttention(PackedArgs args, Any*) {
  constexpr int kFixed = 6, kSpec = 6 + 4 * 4;
  TVM_FLASHINFER_CHECK(args.size() >= kFixed + 1, TypeError)
      << "graph_attention takes kernel, spec, sm_scale, q, k, v, the variant's parameters and o; "
      << args.size() << " arguments were given";
  const auto factory = args[0].cast<Function>();
  const auto spec = args[1].cast<Shape>();
  TVM_FLASHINFER_CHECK(spec.size() == kSpec, ValueError)
      << "argument `spec` has " << spec.size() << " entries, expected " << kSpec;
  const GraphExtents extents{spec[0], spec[1], spec[2], spec[3], spec[4], spec[5]};
  const auto strides = [&](int operand) {
    const int at = 6 + 4 * operand;
    return Strides{spec[at], spec[at + 1], spec[at + 2], spec[at + 3]};
  };
  const auto sm_scale = args[2].cast<double>();
  TVM_FLASHINFER_CHECK(std::isfinite(static_cast<float>(sm_scale)), ValueError)
      << "argument `sm_scale` is " << sm_scale << ", expected a finite float32";
  for (int i = 0; i < 6; ++i) {
    static const char* const kNames[] = {"batch",   "queries",     "keys",
                                         "q_begin", "query heads", "KV heads"};
    const int64_t least = i < 3 ? 0 : i == 3 ? -kMaxExtent : 1;
    TVM_FLASHINFER_CHECK(spec[i] >= least && spec[i] <= kMaxExtent, ValueError)
        << "argument `spec` has " << spec[i] << " for " << kNames[i] << ", expected a value in ["
        << least << ", 2^30]";
  }
  TVM_FLASHINFER_CHECK(extents.num_qo_heads % extents.num_kv_heads == 0, ValueError)
      << "argument `spec` has " << extents.num_qo_heads << " query heads, expected a multiple of "
      << extents.num_kv_heads << ", the KV heads";
  TVM_FLASHINFER_CHECK(extents.batch * extents.num_queries <= kMaxExtent, ValueError)
      << "argument `spec` has " << extents.batch << " requests of " << extents.num_queries
      << " queries, at most 2^30 queries are accepted";
  const auto tensor = [&](int i) -> const DLTensor& { return *args[i].cast<DLTensor*>(); };
  const int last = args.size() - 1;
  const Strides qs = strides(0), ks = strides(1), vs = strides(2), os = strides(3);
  if (extents.batch == 0 || extents.num_queries == 0) return;
  const DLDevice device = tensor(3).device;
  GraphPlan& plan = FindPlan(factory, extents, device);
  const KernelTraits& kernel = plan.kernel();
  const DLDataType q_type = ToDLDataType(kernel.q_type), kv_type = ToDLDataType(kernel.kv_type);
  const int64_t q_tokens = extents.num_queries, kv_tokens = extents.num_keys;
  const int64_t qo = extents.num_qo_heads, kv = extents.num_kv_heads;
  const int64_t qk_dim = kernel.head_dim_qk, vo_dim = kernel.head_dim_vo;
  const auto q = CheckOperand("q", tensor(3), q_type, device, qs, extents, q_tokens, qo, qk_dim);
  const auto k = CheckOperand("k", tensor(4), kv_type, device, ks, extents, kv_tokens, kv, qk_dim);
  const auto v = CheckOperand("v", tensor(5), kv_type, device, vs, extents, kv_tokens, kv, vo_dim);
  const auto o = CheckOperand("o", tensor(last), q_type, device, os, extents, q_tokens, qo, vo_dim);
  plan.variant_args().Bind(kernel, args.Slice(kFixed, last), device);
  plan.Run(q, k, v, o, sm_scale);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def_packed("tvm_flashinfer.graph_attention", GraphAttention);
}

}  // namespace
}  // namespace tvm_flashinfer
