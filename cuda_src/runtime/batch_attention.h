// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Attention over any block-sparse layout whose KV pool the caller owns: plan once per step, run
// once per layer. All memory is taken at creation.
#ifndef TVM_FLASHINFER_RUNTIME_BATCH_ATTENTION_H_
#define TVM_FLASHINFER_RUNTIME_BATCH_ATTENTION_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>
#include <tvm_flashinfer/schedule.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "batch_attention_check.h"
#include "batch_backend.h"
#include "variant_args.h"

namespace tvm_flashinfer {

/*!
 * \brief One level of a layout, as tensors: {qo_indptr, kv_indptr, kv_indices, last_block_len,
 * kv_position}; int32 vectors on the CPU, see LayoutLevel. A row without pages has no last page.
 */
using LevelTensors = tvm::ffi::Array<tvm::ffi::Tensor>;

/*! \brief A batch, as the caller gives it. */
struct PlanRequest {
  TensorView qo_indptr;  //!< [num_requests + 1]
  TensorView kv_len;     //!< [num_requests]
  tvm::ffi::Array<LevelTensors> levels;
  int64_t page_size;
  tvm::ffi::Optional<TensorView> q_position;  //!< [num_q_tokens]; null: bottom-right
  int64_t fixed_chunk;     //!< > 0: batch-invariant, KV is cut at multiples of this many tokens
  bool per_worker_queues;  //!< else all workers take items from one queue
};

/*! \brief Keys and values: two pools, or one tensor that holds both. */
struct PoolTensors {
  TensorView k;
  tvm::ffi::Optional<TensorView> v;
};

class BatchAttentionObj : public tvm::ffi::Object {
 public:
  BatchAttentionObj(const BatchAttentionConfig& config, KernelHandle kernel);

  /*!
   * \brief Make the plan that the next runs execute.
   *
   * Everything is checked, and the plan made beside the current one, before anything changes.
   * \throws ValueError, naming the argument or the section of the plan that is too small.
   */
  void Plan(const PlanRequest& request);

  /*! \brief Parameters of the variant, for this and the following runs. */
  void SetParams(const tvm::ffi::Array<tvm::ffi::Any>& values) {
    variant_args_.Bind(*kernel_, values, config_.device);
  }

  /*!
   * \brief Attention of one layer.
   * \param q [tokens, query heads, head_dim_qk]
   * \param o [tokens, query heads, head_dim_vo]; must not share memory with the inputs.
   * \param lse float32 [tokens, query heads], or null.
   */
  void Run(const TensorView& q, const PoolTensors& pool, double sm_scale, const TensorView& o,
           const tvm::ffi::Optional<TensorView>& lse);

  /*!
   * \brief Store new keys [tokens, KV heads, head_dim_qk] and values into the pool.
   * \param slots int32 [tokens] on the CPU, page * page_size + place in the page; -1 drops the
   * token.
   * \param positions int32 [tokens] on the CPU, in their requests; null: 0, for variants that don't
   * ask.
   */
  void Append(const TensorView& k_new, const TensorView& v_new, const TensorView& slots,
              const PoolTensors& pool, const tvm::ffi::Optional<TensorView>& positions);

  /*! \brief A copy of a section of the current plan, for inspection. */
  tvm::ffi::Tensor Section(const std::string& name) const;

  static constexpr const bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("tvm_flashinfer.BatchAttention", BatchAttentionObj,
                                    tvm::ffi::Object);

 private:
  /*! What of the current plan the operands of a run are checked against. */
  struct Planned {
    int64_t num_tokens = -1;  //!< -1: nothing is planned
    int64_t page_size = 0;
    int32_t max_page = -1;
    VisitedRange visited{};  //!< where the elements of the batch lie
  };
  struct Pools {
    PoolView k, v;
  };

  Planned ReadRequest(const PlanRequest& request, ScheduleInput* in);
  Pools CheckPools(const PoolTensors& pool) const;
  const VariantArgs* CheckStore(int64_t tokens, const tvm::ffi::Optional<TensorView>& positions,
                                int64_t places, const int32_t** position);

  BatchAttentionConfig config_;
  KernelHandle kernel_;
  std::unique_ptr<BatchBackend> backend_;
  std::vector<LayoutLevel> levels_;
  Planned planned_;
  int64_t plan_count_ = 0;
  BoundVariantArgs variant_args_;
  std::vector<int64_t> slots_;
};

class BatchAttention : public tvm::ffi::ObjectRef {
 public:
  explicit BatchAttention(tvm::ffi::ObjectPtr<BatchAttentionObj> object)
      : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(BatchAttention, tvm::ffi::ObjectRef,
                                                BatchAttentionObj);
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_BATCH_ATTENTION_H_
