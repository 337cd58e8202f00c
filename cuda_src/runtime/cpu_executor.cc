// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "cpu_executor.h"

#include "check.h"

#include <tvm/runtime/c_backend_api.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <utility>

namespace tvm_flashinfer {

void CpuExecutor::Free::operator()(void* p) const { std::free(p); }

CpuExecutor::CpuExecutor(KernelHandle kernel, int32_t max_rows)
    : kernel_(std::move(kernel)), num_threads_(NumThreads()) {
  constexpr int64_t kPage = 4096;  // a page apart, threads share no cache line
  scratch_stride_ = (kernel_.cpu().scratch_bytes(max_rows) + kPage - 1) / kPage * kPage;
  void* scratch = std::aligned_alloc(kPage, scratch_stride_ * num_threads_);
  if (scratch == nullptr) throw std::bad_alloc();
  scratch_.reset(static_cast<char*>(scratch));
}

PlanBounds CpuExecutor::Bounds(PlanBounds bounds, const CpuKernel& kernel, int32_t group) {
  bounds.num_workers = NumThreads();
  bounds.heads_together = std::min(kernel.max_heads, bounds.num_kv_heads);
  bounds.together_tokens = kernel.row_tiles[0] / group;
  return bounds;
}

int32_t CpuExecutor::NumThreads() {
  int32_t count = 1;
  const auto body = [](int task, TVMParallelGroupEnv* env, void* data) {
    if (task == 0) *static_cast<int32_t*>(data) = env->num_task;
    return 0;
  };
  TVMBackendParallelLaunch(body, &count, 0);
  return count;
}

template <typename Length, typename Fn>
void CpuExecutor::ParallelFor(int32_t count, const Length& length, const Fn& fn) const {
  if (count < 1) return;
  if (length(0) >= count) return fn(0, 0, count);
  struct Shared {
    const Length* length;
    const Fn* fn;
    int32_t count;
    int32_t num_threads;
    std::atomic<int32_t> next{0};
  } shared{&length, &fn, count, num_threads_, {}};
  const auto body = [](int task, TVMParallelGroupEnv*, void* data) {
    auto* s = static_cast<Shared*>(data);
    // The pool may have grown since scratch was allocated: further threads have no slice.
    if (task >= s->num_threads) return 0;
    for (int32_t i = s->next.load(std::memory_order_relaxed); i < s->count;) {
      const int32_t end = std::min(i + (*s->length)(i), s->count);
      if (!s->next.compare_exchange_weak(i, end, std::memory_order_relaxed)) continue;
      (*s->fn)(task, i, end);
      i = s->next.load(std::memory_order_relaxed);
    }
    return 0;
  };
  const int status = TVMBackendParallelLaunch(body, &shared, 0);
  TVM_FLASHINFER_CHECK(status == 0, RuntimeError)
      << "TVM's thread pool could not run the attention step";
}

template <typename ParamsOf>
void CpuExecutor::RunItems(const PlanView& plan, int32_t group, const ParamsOf& params_of) {
  const CpuKernel& kernel = kernel_.cpu();
  const WorkItem* items = plan.items;
  const int32_t count = plan.header->num_items;
  const int32_t max_heads = std::min(kernel.max_heads, plan.header->heads_together);
  const auto differ_in_head = [&](const WorkItem& a, const WorkItem& b) {
    return b.head == a.head + 1 && a.row == b.row && a.level == b.level && a.q_begin == b.q_begin &&
           a.kv_begin == b.kv_begin;
  };
  const auto heads_together = [&](int32_t i) {
    int32_t n = 1;
    if (items[i].q_count * group > kernel.row_tiles[0]) return n;
    while (n < max_heads && i + n < count && differ_in_head(items[i + n - 1], items[i + n])) ++n;
    return n;
  };
  ParallelFor(count, heads_together, [&](int32_t thread, int32_t begin, int32_t end) {
    kernel.run_items(params_of(items[begin]), items + begin, end - begin,
                     scratch_.get() + thread * scratch_stride_);
  });
}

void CpuExecutor::Run(const AttentionParams& params) {
  const PlanHeader& plan = *params.plan.header;
  RunItems(params.plan, params.num_qo_heads / params.num_kv_heads,
           [&](const WorkItem&) { return &params; });
  if (plan.num_partials == 0) return;
  constexpr int32_t kTokens = 4;
  ParallelFor(
      plan.num_q_tokens, [](int32_t) { return kTokens; },
      [&](int32_t, int32_t begin, int32_t end) { kernel_.cpu().merge(&params, begin, end); });
}

void CpuExecutor::RunRequests(const AttentionParams* by_request, int32_t count, int32_t queries) {
  const PlanView& plan = by_request->plan;
  RunItems(plan, by_request->num_qo_heads / by_request->num_kv_heads,
           [&](const WorkItem& item) { return &by_request[item.row]; });
  if (plan.header->num_partials == 0) return;
  ParallelFor(
      count, [](int32_t) { return 1; },
      [&](int32_t, int32_t r, int32_t) {
        kernel_.cpu().merge(&by_request[r], r * queries, (r + 1) * queries);
      });
}

void CpuExecutor::Append(const AppendParams& params, int32_t count) {
  // Below this, waking threads costs more than the copy.
  constexpr int32_t kTokens = 32;
  ParallelFor(
      count, [](int32_t) { return kTokens; },
      [&](int32_t, int32_t begin, int32_t end) { kernel_.cpu().append(&params, begin, end); });
}

}  // namespace tvm_flashinfer
