// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Attention inside a stateless graph: every request has as many queries and keys as any other, and
// operands are read and written where the graph has them, by strides. A plan depends on the lengths
// only, so it is made once per shape and shared by all layers; a repeated shape allocates nothing.
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm_flashinfer/schedule.h>

#include <algorithm>
#include <cmath>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu_executor.h"
#include "step_plan.h"
#include "tensor_view.h"
#include "variant_args.h"

namespace tvm_flashinfer {
namespace {

using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::PackedArgs;
using tvm::ffi::Shape;
using tvm::ffi::Tensor;

/*! Plans kept per thread; the one used longest ago goes first. */
constexpr size_t kMaxPlans = 32;
constexpr int64_t kMaxExtent = int64_t{1} << 30;

/*! Extents of one attention; what a plan depends on, less the kernel. */
struct Extents {
  int64_t batch, num_queries, num_keys, q_begin, num_qo_heads, num_kv_heads;
  bool operator==(const Extents& o) const {
    return batch == o.batch && num_queries == o.num_queries && num_keys == o.num_keys &&
           q_begin == o.q_begin && num_qo_heads == o.num_qo_heads && num_kv_heads == o.num_kv_heads;
  }
};

/*! Element (b, h, t, d) lies at offset + b * batch + h * head + t * token + d, in elements. */
struct Strides {
  int64_t offset, batch, head, token;
};

class GraphPlan {
 public:
  GraphPlan(const Function& factory, const Extents& extents)
      : kernel_(factory),
        extents_(extents),
        plan_(Bounds(extents, kernel_.cpu()), static_cast<int32_t>(extents.num_qo_heads),
              kernel_->head_dim_vo),
        executor_(kernel_, std::max<int32_t>(kernel_->row_tiles[1], Group())),
        by_request_(extents.batch) {
    const auto batch = static_cast<int32_t>(extents.batch);
    const auto queries = static_cast<int32_t>(extents.num_queries);
    const auto keys = static_cast<int32_t>(extents.num_keys);
    std::vector<int32_t> qo_indptr(batch + 1), kv_indptr(batch + 1), pages(batch);
    const std::vector<int32_t> kv_len(batch, keys), kv_position(batch, 0);
    std::vector<int32_t> q_position(size_t{1} * batch * queries);
    for (int32_t b = 0; b < batch; ++b) {
      qo_indptr[b + 1] = (b + 1) * queries;
      kv_indptr[b + 1] = keys > 0 ? b + 1 : 0;
      pages[b] = b;
      for (int32_t i = 0; i < queries; ++i) {
        q_position[b * queries + i] = static_cast<int32_t>(extents.q_begin) + i;
      }
    }
    LayoutLevel level;
    level.num_rows = batch;
    level.qo_indptr = qo_indptr.data();
    level.kv_indptr = kv_indptr.data();
    level.kv_indices = pages.data();
    level.last_block_len = kv_len.data();
    level.kv_position = kv_position.data();
    ScheduleInput in;
    in.num_requests = batch;
    in.qo_indptr = qo_indptr.data();
    in.kv_len = kv_len.data();
    in.levels = &level;
    in.page_size = std::max(keys, 1);
    in.q_position = q_position.data();
    in.causal = kernel_->causal != 0;
    in.group = Group();
    in.tile_tokens = plan_.bounds().max_tile_tokens;
    in.kv_align = kernel_->kv_align;
    in.shared_queue = true;
    plan_.Make(in);
  }

  const CpuKernel& kernel() const { return kernel_.cpu(); }
  bool Serves(const void* table, const Extents& extents) const {
    return table == static_cast<const void*>(&kernel_.cpu()) && extents == extents_;
  }
  BoundVariantArgs& variant_args() { return variant_args_; }

  /*! What a run visits. */
  VisitedRange Visited() const {
    const Extents& e = extents_;
    const int64_t keys = std::max<int64_t>(e.num_keys, 1);
    return {{{0, e.batch - 1},
             {e.q_begin, e.q_begin + e.num_queries - 1},
             {0, keys - 1},
             {0, e.num_qo_heads - 1},
             {0, e.num_kv_heads - 1}},
            {0, e.batch * e.num_queries - 1},
            {0, e.batch * keys - 1}};
  }

  void Run(const char* q, const Strides& qs, const char* k, const Strides& ks, const char* v,
           const Strides& vs, char* o, const Strides& os, double sm_scale) {
    AttentionParams params{};
    params.variant_params = variant_args_.Get(*kernel_, Visited(), -1);
    params.k = k;
    params.v = v;
    params.k_strides = {ks.batch, ks.head, ks.token};
    params.v_strides = {vs.batch, vs.head, vs.token};
    params.q_token_stride = qs.token;
    params.q_head_stride = qs.head;
    params.o_token_stride = os.token;
    params.o_head_stride = os.head;
    params.page_size = static_cast<int32_t>(std::max<int64_t>(extents_.num_keys, 1));
    params.num_qo_heads = static_cast<int32_t>(extents_.num_qo_heads);
    params.num_kv_heads = static_cast<int32_t>(extents_.num_kv_heads);
    params.sm_scale = static_cast<float>(sm_scale);
    plan_.Describe(&params);
    // Tokens are numbered through the batch, in which queries need not lie evenly: every request
    // gets a base that its first token's number leads to its own rows.
    const int64_t bytes = kernel_->q_type == ElementType::kFloat32 ? 4 : 2;
    for (int64_t b = 0; b < extents_.batch; ++b) {
      const int64_t first = b * extents_.num_queries;
      by_request_[b] = params;
      by_request_[b].q = q + (b * qs.batch - first * qs.token) * bytes;
      by_request_[b].o = o + (b * os.batch - first * os.token) * bytes;
    }
    executor_.RunRequests(by_request_.data(), static_cast<int32_t>(extents_.batch),
                          static_cast<int32_t>(extents_.num_queries));
  }

 private:
  int32_t Group() const {
    return static_cast<int32_t>(extents_.num_qo_heads / extents_.num_kv_heads);
  }

  static PlanBounds Bounds(const Extents& e, const CpuKernel& kernel) {
    PlanBounds b;
    b.max_requests = static_cast<int32_t>(e.batch);
    b.max_q_tokens = static_cast<int32_t>(e.batch * e.num_queries);
    b.max_kv_pages = static_cast<int32_t>(e.batch);
    b.num_kv_heads = static_cast<int32_t>(e.num_kv_heads);
    const auto group = static_cast<int32_t>(e.num_qo_heads / e.num_kv_heads);
    b.max_tile_tokens = std::max(1, kernel.row_tiles[1] / group);
    b = CpuExecutor::Bounds(b, kernel, group);
    TVM_FLASHINFER_CHECK(PlanLayout::Make(b).total <= INT32_MAX, ValueError)
        << "argument `spec` has " << e.batch << " requests of " << e.num_queries << " queries and "
        << e.num_kv_heads << " KV heads: a plan of more than 2^31 entries";
    return b;
  }

  KernelHandle kernel_;
  Extents extents_;
  StepPlan plan_;
  CpuExecutor executor_;
  std::vector<AttentionParams> by_request_;
  BoundVariantArgs variant_args_;
};

/*! The calling thread's plan for a kernel and extents, most recently used first. */
GraphPlan& FindPlan(const Function& factory, const Extents& extents) {
  static thread_local std::list<std::unique_ptr<GraphPlan>> plans;
  const void* table = factory().cast<void*>();
  for (auto it = plans.begin(); it != plans.end(); ++it) {
    if (!(*it)->Serves(table, extents)) continue;
    plans.splice(plans.begin(), plans, it);
    return *plans.front();
  }
  auto made = std::make_unique<GraphPlan>(factory, extents);
  if (plans.size() >= kMaxPlans) plans.pop_back();
  plans.push_front(std::move(made));
  return *plans.front();
}

/*! Check that an operand is what the kernel takes, and that no element lies outside it. */
char* CheckOperand(const char* name, const DLTensor& t, DLDataType dtype, const Strides& s,
                   const Extents& e, int64_t tokens, int64_t heads, int64_t dim) {
  TVM_FLASHINFER_CHECK(t.dtype == dtype, TypeError)
      << "argument `" << name << "` has dtype " << tvm::ffi::DLDataTypeToString(t.dtype)
      << ", the kernel was compiled for " << tvm::ffi::DLDataTypeToString(dtype);
  TVM_FLASHINFER_CHECK(t.device.device_type == kDLCPU, ValueError)
      << "argument `" << name << "` is not on the CPU";
  TVM_FLASHINFER_CHECK(tvm::ffi::IsContiguous(t), ValueError)
      << "argument `" << name << "` of shape " << ShapeString(t) << " is not contiguous";
  char* data = static_cast<char*>(DataOf(t));
  if (e.batch == 0 || tokens == 0) return data;
  int64_t elements = 1;
  for (int i = 0; i < t.ndim; ++i) elements *= t.shape[i];
  int64_t lo = s.offset, hi = s.offset + dim - 1;
  const int64_t reach[][2] = {{e.batch, s.batch}, {heads, s.head}, {tokens, s.token}};
  for (const auto& axis : reach) (axis[1] < 0 ? lo : hi) += (axis[0] - 1) * axis[1];
  TVM_FLASHINFER_CHECK(lo >= 0 && hi < elements, ValueError)
      << "argument `spec` reads elements " << lo << " to " << hi << " of argument `" << name
      << "`, which has " << elements;
  return data + s.offset * (dtype.bits / 8);
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
  const Extents extents{spec[0], spec[1], spec[2], spec[3], spec[4], spec[5]};
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
  GraphPlan& plan = FindPlan(factory, extents);
  const CpuKernel& kernel = plan.kernel();
  const DLDataType q_type = ToDLDataType(kernel.q_type), kv_type = ToDLDataType(kernel.kv_type);
  const int64_t q_tokens = extents.num_queries, kv_tokens = extents.num_keys;
  const int64_t qo = extents.num_qo_heads, kv = extents.num_kv_heads;
  const char* q =
      CheckOperand("q", tensor(3), q_type, qs, extents, q_tokens, qo, kernel.head_dim_qk);
  const char* k =
      CheckOperand("k", tensor(4), kv_type, ks, extents, kv_tokens, kv, kernel.head_dim_qk);
  const char* v =
      CheckOperand("v", tensor(5), kv_type, vs, extents, kv_tokens, kv, kernel.head_dim_vo);
  char* o = CheckOperand("o", tensor(last), q_type, os, extents, q_tokens, qo, kernel.head_dim_vo);
  plan.variant_args().Bind(kernel, args.Slice(kFixed, last), {kDLCPU, 0});
  plan.Run(q, qs, k, ks, v, vs, o, os, sm_scale);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def_packed("tvm_flashinfer.graph_attention", GraphAttention);
}

}  // namespace
}  // namespace tvm_flashinfer
