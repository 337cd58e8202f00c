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

int32_t CpuExecutor::NumThreads() {
  int32_t count = 1;
  const auto body = [](int task, TVMParallelGroupEnv* env, void* data) {
    if (task == 0) *static_cast<int32_t*>(data) = env->num_task;
    return 0;
  };
  TVMBackendParallelLaunch(body, &count, 0);
  return count;
}

/*! Call fn(thread, index) for every index in [0, count), on all threads of TVM's pool. */
template <typename Fn>
void CpuExecutor::ParallelFor(int32_t count, const Fn& fn) const {
  if (count == 1) return fn(0, 0);
  if (count < 1) return;
  struct Shared {
    const Fn* fn;
    int32_t count;
    int32_t num_threads;
    std::atomic<int32_t> next{0};
  } shared{&fn, count, num_threads_, {}};
  const auto body = [](int task, TVMParallelGroupEnv*, void* data) {
    auto* s = static_cast<Shared*>(data);
    // The pool may have grown since scratch was allocated: further threads have no slice.
    if (task >= s->num_threads) return 0;
    for (int32_t i; (i = s->next.fetch_add(1, std::memory_order_relaxed)) < s->count;) {
      (*s->fn)(task, i);
    }
    return 0;
  };
  const int status = TVMBackendParallelLaunch(body, &shared, 0);
  TVM_FLASHINFER_CHECK(status == 0, RuntimeError)
      << "TVM's thread pool could not run the attention step";
}

void CpuExecutor::Run(const AttentionParams& params) {
  const CpuKernel& kernel = kernel_.cpu();
  const PlanHeader& plan = *params.plan.header;
  ParallelFor(plan.num_items, [&](int32_t thread, int32_t i) {
    kernel.run_item(&params, &params.plan.items[i], scratch_.get() + thread * scratch_stride_);
  });
  if (plan.num_partials == 0) return;
  constexpr int32_t kTokens = 4;
  ParallelFor((plan.num_q_tokens + kTokens - 1) / kTokens, [&](int32_t, int32_t i) {
    kernel.merge(&params, i * kTokens, std::min((i + 1) * kTokens, plan.num_q_tokens));
  });
}

void CpuExecutor::RunRequests(const AttentionParams* by_request, int32_t count, int32_t queries) {
  const CpuKernel& kernel = kernel_.cpu();
  const PlanView& plan = by_request->plan;
  ParallelFor(plan.header->num_items, [&](int32_t thread, int32_t i) {
    const WorkItem& item = plan.items[i];
    kernel.run_item(&by_request[item.row], &item, scratch_.get() + thread * scratch_stride_);
  });
  if (plan.header->num_partials == 0) return;
  ParallelFor(count, [&](int32_t, int32_t r) {
    kernel.merge(&by_request[r], r * queries, (r + 1) * queries);
  });
}

void CpuExecutor::Append(const AppendParams& params, int32_t count) {
  // Below this, waking threads costs more than the copy.
  constexpr int32_t kTokens = 32;
  ParallelFor((count + kTokens - 1) / kTokens, [&](int32_t, int32_t i) {
    kernel_.cpu().append(&params, i * kTokens, std::min((i + 1) * kTokens, count));
  });
}

}  // namespace tvm_flashinfer
