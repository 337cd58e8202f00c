// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Runs CPU kernels on TVM's thread pool. Threads take work items from one queue as they finish, for
// cores are shared; results don't depend on who took what.
#ifndef TVM_FLASHINFER_RUNTIME_CPU_EXECUTOR_H_
#define TVM_FLASHINFER_RUNTIME_CPU_EXECUTOR_H_

#include <tvm_flashinfer/cpu/kernel.h>
#include <tvm_flashinfer/params.h>

#include <cstdint>
#include <memory>

#include "kernel_handle.h"

namespace tvm_flashinfer {

class CpuExecutor {
 public:
  /*! \param max_rows Packed rows of the largest item. */
  CpuExecutor(KernelHandle kernel, int32_t max_rows);

  /*! \brief Threads of TVM's pool, the caller's included. */
  static int32_t NumThreads();
  /*!
   * \brief Bounds of plans for this executor: a thread is a worker, and takes as many KV heads at
   * once as `kernel` computes together.
   */
  static PlanBounds Bounds(PlanBounds bounds, const CpuKernel& kernel, int32_t group);

  /*! \brief Attention of one layer: every work item, then the merge of partial states. */
  void Run(const AttentionParams& params);
  /*!
   * \brief As Run, with operands per request of `queries` tokens each; row r of the layout is
   * request r. All share one plan and workspace.
   */
  void RunRequests(const AttentionParams* by_request, int32_t count, int32_t queries);
  /*! \brief Store `count` new tokens into the pool. */
  void Append(const AppendParams& params, int32_t count);

 private:
  /*! \brief Call fn(thread, begin, end) over [0, count), cut where `length(begin)` says. */
  template <typename Length, typename Fn>
  void ParallelFor(int32_t count, const Length& length, const Fn& fn) const;
  /*! \brief Every work item, with the operands that `params_of(item)` points to. */
  template <typename ParamsOf>
  void RunItems(const PlanView& plan, int32_t group, const ParamsOf& params_of);

  KernelHandle kernel_;
  int32_t num_threads_;
  int64_t scratch_stride_;
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<char, Free> scratch_;  //!< one slice a thread
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_CPU_EXECUTOR_H_
