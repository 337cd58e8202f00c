// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Merges partial states in the launch that made them: the block that completes a token's last
// state merges all of them. Tickets only decide who merges; the order of the merge is the plan's,
// so results do not depend on timing.
#ifndef TVM_FLASHINFER_CUDA_MERGE_CUH_
#define TVM_FLASHINFER_CUDA_MERGE_CUH_

#include "launch_params.cuh"
#include "online_softmax.cuh"
#include "output.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief The states of a token in the plan's list: the same of all its heads. */
struct MergeList {
  int begin, count;
};

/*! \brief The same, and the first of its rows. */
struct MergedStates : MergeList {
  int first;  //!< row of this lane's among the first 32

  __device__ __forceinline__ MergedStates(const LaunchParams& p, const MergeList& list, int lane)
      : MergeList(list), first(Row(p, 0, lane)) {}
  /*! \brief Row of a lane's state from the `done`-th on; lanes past the end repeat the last. */
  __device__ __forceinline__ int Row(const LaunchParams& p, int done, int lane) const {
    return p.plan.merge_rows[begin + min(done + lane, count - 1)];
  }
};

/*!
 * \brief Merge the states of one token and query head; by one warp, a lane a state for weights and
 * four columns of each 128 for outputs.
 */
template <typename C, typename Variant>
__device__ __forceinline__ void MergeRow(const LaunchParams& p,
                                         const typename Variant::Params& variant,
                                         const MergedStates& merged, int token, int head,
                                         int lane) {
  constexpr int kPanels = CeilDiv(C::kHeadDimVO, 4 * kWarpSize);
  // States loaded at a time: as many as registers allow beside a kernel's own.
  constexpr int kBatch = kPanels >= 4 ? 2 : kPanels == 1 && C::kHeadDimVO > 64 ? 16 : 8;
  const int column = lane * 4;
  // Bytes, so that a state's address is one multiplication.
  const char* outputs = reinterpret_cast<const char*>(p.o_partial + head * C::kHeadDimVO);
  const auto pitch = static_cast<uint32_t>(p.num_qo_heads * C::kHeadDimVO * 4);
  float top = TVM_FLASHINFER_NEG_INF, sum = 0.0f;
  float x[kPanels][4] = {};
  for (int done = 0; done < merged.count; done += kWarpSize) {
    const int states = min(kWarpSize, merged.count - done);
    // Lanes past the end have no weight.
    const int row = done == 0 ? merged.first : merged.Row(p, done, lane);
    float o[kBatch][kPanels][4];
    const auto load = [&](int first) {
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const auto from = static_cast<uint32_t>(__shfl_sync(0xffffffffu, row, first + n));
        const auto* output = reinterpret_cast<const float*>(outputs + uint64_t{from} * pitch);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          ptx::LoadL2(o[n][panel], output + min(panel * 4 * kWarpSize + column, C::kHeadDimVO - 4));
        }
      }
    };
    const float natural = ptx::LoadL2(p.lse_partial + int64_t{row} * p.num_qo_heads + head);
    load(0);
    __syncwarp();  // else the compiler issues these loads after it has waited for the one before
    const float lse = natural * kLog2e;
    const float new_top = fmaxf(top, WarpMax(lse));
    const float shift = new_top == TVM_FLASHINFER_NEG_INF ? 0.0f : new_top;
    const float rescale = ptx::Exp2(top - shift);
    const float weight = lane < states ? ptx::Exp2(lse - shift) : 0.0f;
    top = new_top;
    sum = sum * rescale + WarpSum(weight);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[panel][e] *= rescale;
    }
    for (int i = 0;;) {
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const float w = __shfl_sync(0xffffffffu, weight, i + n);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
          for (int e = 0; e < 4; ++e) x[panel][e] += w * o[n][panel][e];
        }
      }
      i += kBatch;
      if (i >= states) break;
      load(i);
    }
  }
  const StateWriter<typename C::T, C::kHeadDimVO> writer(p, token, head, -1);
  const StateFinish finish = FinishState<Variant>(p, variant, token, head, true, top, sum);
  // A transform of outputs sees the whole row: it is left over the first partial output.
  float* whole = p.o_partial +
                 (int64_t{p.plan.merge_rows[merged.begin]} * p.num_qo_heads + head) * C::kHeadDimVO;
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const int at = panel * 4 * kWarpSize + column;
    if (at >= C::kHeadDimVO) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) x[panel][e] *= finish.scale;
    if constexpr (Variant::kHasOutput) {
#pragma unroll
      for (int e = 0; e < 4; ++e) whole[at + e] = x[panel][e];
    } else {
      writer.Write(at, x[panel]);
    }
  }
  if (lane == 0) writer.WriteLse(finish.lse);
  if constexpr (Variant::kHasOutput) {
    __syncwarp();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int at = panel * 4 * kWarpSize + column;
      if (at >= C::kHeadDimVO) continue;
      TransformOutput<Variant, C::kHeadDimVO>(p, variant, token, head, whole, at, x[panel]);
      writer.Write(at, x[panel]);
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
__device__ __forceinline__ void MergeCompleted(const LaunchParams& p,
                                               const typename Variant::Params& variant,
                                               const WorkItem& item, uint8_t* smem) {
  // Of each token of the item what is to be merged: nothing unless its states are complete.
  auto* lists = reinterpret_cast<MergeList*>(smem);
  static_assert(sizeof(MergeList) * C::kRows <= C::kMergeBytes, "an item has up to kRows tokens");
  static_assert(C::kRows <= C::kConsumerThreads, "a thread counts for at most one token");
  const int t = static_cast<int>(threadIdx.x);
  const bool counts = t < item.q_count;
  const int token = item.q_begin + (counts ? t : 0);
  const int begin = p.plan.merge_indptr[token];
  const int states = p.plan.merge_indptr[token + 1] - begin;
  Pipeline<C>::SyncConsumers();
  if (counts) {
    int32_t* ticket = p.tickets + int64_t{token} * p.num_kv_heads + item.head;
    const bool last = ptx::AtomicAddOrdered(ticket, 1) == states - 1;
    if (last) *ticket = 0;
    lists[t] = {begin, last ? states : 0};
  }
  Pipeline<C>::SyncConsumers();
  const int group = p.group.value();
  const int warp = t / kWarpSize, lane = t % kWarpSize;
  for (int i = 0; i < item.q_count; ++i) {
    const MergeList list = lists[i];
    if (list.count == 0) continue;
    const MergedStates merged(p, list, lane);
    // Heads of the tile's tokens are dealt to warps one after another.
    const int rest = i * group % C::kConsumerWarps;
    for (int h = (warp - rest + C::kConsumerWarps) % C::kConsumerWarps; h < group;
         h += C::kConsumerWarps) {
      MergeRow<C, Variant>(p, variant, merged, item.q_begin + i, item.head * group + h, lane);
    }
  }
  Pipeline<C>::SyncConsumers();  // the next item reuses the memory
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_MERGE_CUH_
