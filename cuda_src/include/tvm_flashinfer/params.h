// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The operands of one run: queries, KV pool, outputs, workspace and the plan.
#ifndef TVM_FLASHINFER_PARAMS_H_
#define TVM_FLASHINFER_PARAMS_H_

#include <cstdint>

#include "plan.h"

namespace tvm_flashinfer {

/*! \brief Strides, in elements, of a KV pool whose rows (one token of one head) are contiguous. */
struct KVStrides {
  int64_t page, head, token;
};

/*!
 * \brief Operands of one attention run. Pointers are host or device pointers, as the backend's.
 *
 * Partial states are float32 and lie in `o_partial` [partial row, query head, head_dim_vo] and
 * - on a CPU `softmax_partial` [partial row, query head, 2]: the largest logit, and the sum of
 *   exponentials under it, by which the output is not yet divided. No logarithm is rounded, so
 *   splitting keys costs no accuracy, however large logits are;
 * - on a GPU `lse_partial` [partial row, query head], natural-log; outputs are normalised.
 */
struct AttentionParams {
  const void* q;
  const void* k;
  const void* v;
  void* o;
  float* lse;  //!< [query token, query head], or null
  float* o_partial;
  float* lse_partial;
  const void* variant_params;
  int64_t q_token_stride, q_head_stride;
  int64_t o_token_stride, o_head_stride;
  KVStrides k_strides, v_strides;
  int32_t page_size;
  int32_t num_qo_heads;
  int32_t num_kv_heads;
  float sm_scale;
  PlanView plan;
  int32_t* tickets;  //!< on a GPU, [query token, KV head]: zeros, and zeros after every run
  float* softmax_partial;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_PARAMS_H_
