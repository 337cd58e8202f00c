// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Merges partial states in the launch that made them: the block that completes a token's last
// state merges all of them. Tickets only decide who merges; the order of the merge is the plan's,
// so results do not depend on timing.
#ifndef TVM_FLASHINFER_CUDA_MERGE_CUH_
#define TVM_FLASHINFER_CUDA_MERGE_CUH_

#include "../params.h"
#include "online_softmax.cuh"
#include "output.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief The first of a token's partial outputs of a query head. */
template <typename C>
__device__ __forceinline__ float* FirstPartial(const AttentionParams& p, int token, int head) {
  const int64_t row = p.plan.merge_rows[p.plan.merge_indptr[token]];
  return p.o_partial + (row * p.num_qo_heads + head) * C::kHeadDimVO;
}

/*! \brief Merge the states of one token, of every query head of a KV head. All consumers call it.
 */
template <typename C, typename Variant>
__device__ __forceinline__ void MergeToken(const AttentionParams& p,
                                           const typename Variant::Params& variant, int token,
                                           int kv_head, float* lse, int32_t* rows) {
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int begin = p.plan.merge_indptr[token];
  const int count = p.plan.merge_indptr[token + 1] - begin;
  constexpr int kUnits = C::kHeadDimVO / 4;
  constexpr int kBatch = 8;
  // Every thread passes the barriers below equally often, whether it has a unit left or not.
  for (int first = 0; first < group * kUnits; first += C::kConsumerThreads) {
    const int unit = first + static_cast<int>(threadIdx.x);
    const bool active = unit < group * kUnits;
    const int g = active ? unit / kUnits : 0, column = unit % kUnits * 4;
    float top = TVM_FLASHINFER_NEG_INF, sum = 0.0f;
    float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int done = 0; done < count; done += C::kMergeStates) {
      const int states = min(C::kMergeStates, count - done);
      Pipeline<C>::SyncConsumers();
      for (int i = static_cast<int>(threadIdx.x); i < states * group; i += C::kConsumerThreads) {
        const int row = p.plan.merge_rows[begin + done + i / group];
        if (i % group == 0) rows[i / group] = row;
        lse[i] = ptx::LoadL2(p.lse_partial + int64_t{row} * p.num_qo_heads + kv_head * group +
                             i % group) *
                 kLog2e;
      }
      Pipeline<C>::SyncConsumers();
      if (!active) continue;
      float new_top = top;
      for (int i = 0; i < states; ++i) new_top = fmaxf(new_top, lse[i * group + g]);
      const float shift = new_top == TVM_FLASHINFER_NEG_INF ? 0.0f : new_top;
      const float rescale = ptx::Exp2(top - shift);
      top = new_top;
      sum *= rescale;
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] *= rescale;
      // Loads of a batch first, so that they are in flight together.
      for (int i = 0; i < states; i += kBatch) {
        float o[kBatch][4];
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          const int state = min(i + n, states - 1);
          ptx::LoadL2(o[n], p.o_partial +
                                (int64_t{rows[state]} * p.num_qo_heads + kv_head * group + g) *
                                    C::kHeadDimVO +
                                column);
        }
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          const float weight = i + n < states ? ptx::Exp2(lse[(i + n) * group + g] - shift) : 0.0f;
          sum += weight;
#pragma unroll
          for (int e = 0; e < 4; ++e) x[e] += weight * o[n][e];
        }
      }
    }
    if (!active) continue;
    const int head = kv_head * group + g;
    const StateWriter<typename C::T, C::kHeadDimVO> writer(p, token, head, -1);
    const StateFinish finish = FinishState<Variant>(p, variant, token, head, true, top, sum);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= finish.scale;
    if constexpr (Variant::kHasOutput) {
      // Over the first partial output, of which only this thread needed these columns.
      float* whole = FirstPartial<C>(p, token, head) + column;
#pragma unroll
      for (int e = 0; e < 4; ++e) whole[e] = x[e];
    } else {
      writer.Write(column, x);
    }
    if (column == 0) writer.WriteLse(finish.lse);
  }
  if constexpr (Variant::kHasOutput) {
    Pipeline<C>::SyncConsumers();
    for (int unit = static_cast<int>(threadIdx.x); unit < group * kUnits;
         unit += C::kConsumerThreads) {
      const int head = kv_head * group + unit / kUnits, column = unit % kUnits * 4;
      float x[4];
      TransformOutput<Variant, C::kHeadDimVO>(p, variant, token, head,
                                              FirstPartial<C>(p, token, head), column, x);
      StateWriter<typename C::T, C::kHeadDimVO>(p, token, head, -1).Write(column, x);
    }
  }
}

/*!
 * \brief Count the item's partial states in, and merge the tokens that this completes.
 *
 * The partial states were written by any of the block's consumers, who all call this. `p.tickets`
 * [token, KV head] holds how many states of a token are there; it returns to zero with the last.
 * \param smem kMergeBytes.
 */
template <typename C, typename Variant>
__device__ __forceinline__ void MergeCompleted(const AttentionParams& p,
                                               const typename Variant::Params& variant,
                                               const WorkItem& item, uint8_t* smem) {
  int32_t* complete = reinterpret_cast<int32_t*>(smem);           // [kRows] tokens
  int32_t* rows = complete + C::kRows;                            // [kMergeStates]
  float* lse = reinterpret_cast<float*>(rows + C::kMergeStates);  // [kMergeStates, group]
  static_assert(C::kRows <= C::kConsumerThreads, "a thread counts for at most one token");
  const int t = static_cast<int>(threadIdx.x);
  const bool counts = t < item.q_count;
  const int token = item.q_begin + (counts ? t : 0);
  const int states = p.plan.merge_indptr[token + 1] - p.plan.merge_indptr[token];
  Pipeline<C>::SyncConsumers();
  if (counts) {
    int32_t* ticket = p.tickets + kQueueTickets + int64_t{token} * p.num_kv_heads + item.head;
    const bool last = ptx::AtomicAddOrdered(ticket, 1) == states - 1;
    if (last) *ticket = 0;
    complete[t] = last;
  }
  Pipeline<C>::SyncConsumers();
  for (int i = 0; i < item.q_count; ++i) {
    if (complete[i]) MergeToken<C, Variant>(p, variant, item.q_begin + i, item.head, lse, rows);
  }
  Pipeline<C>::SyncConsumers();  // the next item reuses the memory
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_MERGE_CUH_
