// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Block-sparse attention for sm_80 and later: FlashAttention-2 over a plan's work items.
//
//   persistent blocks, one queue of work items each             (work_queue.cuh)
//     per item: gather KV rows with cp.async, kStages deep        (kv_gather.cuh)
//               S = Q K^T, variant, mask                          (mask.cuh)
//               online softmax, O += P V                          (online_softmax.cuh)
//               write the state, or a partial one                 (output.cuh)
//               merge the tokens whose last state this was        (merge.cuh)
#ifndef TVM_FLASHINFER_CUDA_ATTENTION_CUH_
#define TVM_FLASHINFER_CUDA_ATTENTION_CUH_

#include "../params.h"
#include "../variant.h"
#include "block_layout.cuh"
#include "kv_gather.cuh"
#include "mask.cuh"
#include "merge.cuh"
#include "online_softmax.cuh"
#include "output.cuh"
#include "ptx.cuh"
#include "q_tile.cuh"
#include "tile_config.cuh"
#include "work_queue.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Query fragments of a warp: in registers, or read again at every use. */
template <typename C>
class QFragments {
 public:
  __device__ __forceinline__ void Init(const BlockLayout<C>& at, uint32_t tile) {
    tile_ = tile;
    if constexpr (C::kQInRegisters) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) QTile<C>::Fragment(registers_[k], at, tile, 0, k);
    }
  }
  __device__ __forceinline__ void Get(uint32_t (&a)[C::kRowBlocks][4], const BlockLayout<C>& at,
                                      int k) const {
#pragma unroll
    for (int b = 0; b < C::kRowBlocks; ++b) {
      if constexpr (C::kQInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[b][i] = registers_[k][i];
      } else {
        QTile<C>::Fragment(a[b], at, tile_, b, k);
      }
    }
  }

 private:
  static constexpr int kSteps = C::kHeadDimQK / 16;
  uint32_t registers_[C::kQInRegisters ? kSteps : 1][4];
  uint32_t tile_;
};

/*! \brief s = Q K^T of one slice's step. */
template <typename C>
__device__ __forceinline__ void MultiplyQK(float (&s)[C::kRowBlocks][C::kSliceKV / 8][4],
                                           const QFragments<C>& q, const BlockLayout<C>& at,
                                           uint32_t k_tile) {
#pragma unroll
  for (int b = 0; b < C::kRowBlocks; ++b) {
#pragma unroll
    for (int n = 0; n < C::kSliceKV / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[b][n][e] = 0.0f;
    }
  }
  const int row = at.lane % 8 + at.lane / 16 * 8;
  const int chunk = at.lane / 8 % 2;
#pragma unroll
  for (int k = 0; k < C::kHeadDimQK / 16; ++k) {
    uint32_t a[C::kRowBlocks][4];
    q.Get(a, at, k);
#pragma unroll
    for (int n = 0; n < C::kSliceKV / 16; ++n) {
      uint32_t b[4];
      ptx::LdMatrixX4(b, k_tile + C::KTile::Offset(n * 16 + row, k * 2 + chunk));
#pragma unroll
      for (int r = 0; r < C::kRowBlocks; ++r) {
        ptx::MmaM16N8K16<typename C::T>(s[r][2 * n], a[r], b[0], b[1]);
        ptx::MmaM16N8K16<typename C::T>(s[r][2 * n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

/*! \brief o += P V of one slice's step; probabilities are rounded to the operand type. */
template <typename C>
__device__ __forceinline__ void MultiplyPV(float (&o)[C::kRowBlocks][C::kHeadDimVO / 8][4],
                                           const float (&s)[C::kRowBlocks][C::kSliceKV / 8][4],
                                           const BlockLayout<C>& at, uint32_t v_tile) {
  using T = typename C::T;
  const int row = at.lane % 16;
  const int chunk = at.lane / 16;
#pragma unroll
  for (int k = 0; k < C::kSliceKV / 16; ++k) {
    uint32_t a[C::kRowBlocks][4];
#pragma unroll
    for (int r = 0; r < C::kRowBlocks; ++r) {
      a[r][0] = ptx::Pack2<T>(s[r][2 * k][0], s[r][2 * k][1]);
      a[r][1] = ptx::Pack2<T>(s[r][2 * k][2], s[r][2 * k][3]);
      a[r][2] = ptx::Pack2<T>(s[r][2 * k + 1][0], s[r][2 * k + 1][1]);
      a[r][3] = ptx::Pack2<T>(s[r][2 * k + 1][2], s[r][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < C::kHeadDimVO / 16; ++n) {
      uint32_t b[4];
      ptx::LdMatrixX4Trans(b, v_tile + C::VTile::Offset(k * 16 + row, n * 2 + chunk));
#pragma unroll
      for (int r = 0; r < C::kRowBlocks; ++r) {
        ptx::MmaM16N8K16<T>(o[r][2 * n], a[r], b[0], b[1]);
        ptx::MmaM16N8K16<T>(o[r][2 * n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

/*! \brief Attention of one work item: its states are written when this returns. */
template <typename C, typename Variant>
__device__ __forceinline__ void AttendItem(const AttentionParams& p,
                                           const typename Variant::Params& variant,
                                           const WorkItem& item, uint8_t* smem) {
  const BlockLayout<C> at;
  const QTile<C> q(p, item);
  const KVGather<C> gather(p, item, at);
  const int steps = CeilDiv(item.kv_count, C::kStepKV);

  const uint32_t slots = ptx::SharedAddress(smem) + C::kQBytes +
                         at.slice * (C::kSliceKBytes + C::kSliceVBytes);
  const auto k_slot = [&](int slot) { return slots + slot * C::kStageBytes; };
  const auto v_slot = [&](int slot) { return k_slot(slot) + C::kSliceKBytes; };

  using Rows = typename KVGather<C>::Rows;
  Rows ahead[C::kStages];
#pragma unroll
  for (int s = 0; s < C::kStages; ++s) ahead[s] = gather.Resolve(s);
  const ItemMask<C, Variant> mask(p, variant, item, q, at);

  // The queries share the first group of copies. Each warp reads only rows that it loaded itself,
  // unless slices share one tile.
  const uint32_t q_tile = C::kQInRegisters ? k_slot(C::kStages - 1) : ptx::SharedAddress(smem);
  if (C::kQInRegisters || at.slice == 0) q.Load(p, at, q_tile);
  const auto load = [&](int step, int slot, const Rows& rows) {
    const bool seen = mask.Classify(step) != TileClass::kEmpty;
    if (seen) gather.LoadK(rows, k_slot(slot));
    ptx::CpAsyncCommit();
    if (seen) gather.LoadV(rows, v_slot(slot));
    ptx::CpAsyncCommit();
  };
#pragma unroll
  for (int s = 0; s < C::kStages - 1; ++s) load(s, s, ahead[s]);
  Rows next = ahead[C::kStages - 1];

  // Groups in flight behind the K of a step: its V, and both of the kStages - 2 steps after it.
  constexpr int kBehindK = 2 * (C::kStages - 2) + 1;
  constexpr int kBehindV = 2 * (C::kStages - 1);
  ptx::CpAsyncWait<kBehindK>();
  if constexpr (C::kQInRegisters || C::kSlices == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  QFragments<C> q_fragments;
  q_fragments.Init(at, q_tile);

  // A scale of any sign: maxima are of logits under a positive one.
  float scale = Variant::kHasLogits ? 1.0f : p.sm_scale * kLog2e;
  const float sign = scale < 0.0f ? -1.0f : scale == 0.0f ? 0.0f : 1.0f;
  scale = scale == 0.0f ? 1.0f : fabsf(scale);

  OnlineSoftmax<C::kRowBlocks, C::kHeadDimVO> state;
  int slot = 0;
  for (int step = 0; step < steps; ++step) {
    const int free_slot = slot == 0 ? C::kStages - 1 : slot - 1;
    ptx::CpAsyncWait<kBehindK>();
    at.SyncSlice();  // K is there, and everyone is done with the slot of the step before
    load(step + C::kStages - 1, free_slot, next);
    next = gather.Resolve(step + C::kStages);

    const TileClass tile = mask.Classify(step);
    float s[C::kRowBlocks][C::kSliceKV / 8][4];
    if (tile != TileClass::kEmpty) {
      MultiplyQK<C>(s, q_fragments, at, k_slot(slot));
      if constexpr (Variant::kHasLogits) {
        mask.Transform(s, step, p.sm_scale);
      } else if (sign != 1.0f) {
#pragma unroll
        for (int b = 0; b < C::kRowBlocks; ++b) {
#pragma unroll
          for (int n = 0; n < C::kSliceKV / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[b][n][e] *= sign;
          }
        }
      }
      if (tile == TileClass::kMixed) mask.Mask(s, step);
      state.Update(s, scale);
    }
    ptx::CpAsyncWait<kBehindV>();
    at.SyncSlice();
    if (tile != TileClass::kEmpty) MultiplyPV<C>(state.o, s, at, v_slot(slot));
    slot = slot + 1 == C::kStages ? 0 : slot + 1;
  }
  ptx::CpAsyncWait<0>();
  state.Finish(scale);
  if constexpr (C::kSlices == 1) {
    WriteStates<C>(p, item, q, at, state);
  } else {
    __syncthreads();
    MergeSlices<C>(p, item, q, at, state, smem);
  }
}

/*!
 * \brief The kernel: one block a worker, as many blocks as the plan's bounds have workers.
 *
 * Reads the plan from device memory, so a captured launch serves every later plan of its bounds.
 */
template <typename C, typename Variant>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
    AttentionKernel(const __grid_constant__ AttentionParams p,
                    const __grid_constant__ typename Variant::Params variant) {
  TVM_FLASHINFER_DYNAMIC_SHARED(smem);
  WorkQueue queue(p, reinterpret_cast<int32_t*>(smem + C::kQueueOffset));
  while (queue.HasItem()) {
    const WorkItem item = p.plan.items[queue.Begin()];
    AttendItem<C, Variant>(p, variant, item, smem);
    if (item.partial >= 0) MergeCompleted<C>(p, item, smem);
    queue.Advance();
  }
  queue.Finish();
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_ATTENTION_CUH_
