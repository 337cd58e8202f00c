// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Where a BatchAttention plans and runs: operands are checked before they come here.
#ifndef TVM_FLASHINFER_RUNTIME_BATCH_BACKEND_H_
#define TVM_FLASHINFER_RUNTIME_BATCH_BACKEND_H_

#include <tvm_flashinfer/params.h>
#include <tvm_flashinfer/schedule.h>

#include <cstdint>
#include <memory>

#include "batch_attention_check.h"
#include "kernel_handle.h"

namespace tvm_flashinfer {

/*! \brief What a BatchAttention is made for. */
struct BatchAttentionConfig {
  PlanBounds bounds;  //!< num_kv_heads and max_tile_tokens are derived
  int32_t num_qo_heads, num_kv_heads;
  int32_t head_dim_qk, head_dim_vo;
  PoolOrder order;
  DLDevice device;
};

/*! \brief New keys and values, and where in the pool they go. */
struct BatchAppend {
  TokenView k_new, v_new;
  PoolView k, v;
  int32_t num_tokens;
  const int64_t* slots;      //!< [num_tokens], in host memory; negative: drop
  const int32_t* positions;  //!< likewise; null: the variant doesn't ask
  const VariantArgs* variant;
};

class BatchBackend {
 public:
  virtual ~BatchBackend() = default;

  /*! \brief The backend of a kernel, with all the memory that it needs before it plans. */
  static std::unique_ptr<BatchBackend> Make(const BatchAttentionConfig& config,
                                            const KernelHandle& kernel);

  /*!
   * \brief Plan a batch, and use the plan from now on.
   * \param in The batch; the tile and the queues are chosen here.
   * \throws PlanOverflow before anything changes.
   */
  virtual void Plan(ScheduleInput* in, bool per_worker_queues) = 0;
  /*! \brief Run the plan in use; fills in what it and the workspace decide. */
  virtual void Run(AttentionParams* params) = 0;
  virtual void Append(const BatchAppend& append) = 0;
  /*! \brief The plan in use, in host memory. */
  virtual const int32_t* plan() const = 0;
  virtual const PlanLayout& layout() const = 0;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_BATCH_BACKEND_H_
