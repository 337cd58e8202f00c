// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Block-sparse attention for sm_80 and later: FlashAttention-2 over a plan's work items.
//
//   persistent blocks, each with
//     producer warps: take items, gather KV rows into a ring        (producer.cuh, kv_gather.cuh)
//     consumer warps: transform queries, keys and values            (query_transform, convert.cuh)
//                     S = Q K^T, variant, mask                      (mask.cuh)
//                     online softmax, O += P V                      (online_softmax.cuh)
//                     write the state, or a partial one             (output.cuh)
//                     merge the tokens whose last state this was    (merge.cuh)
#ifndef TVM_FLASHINFER_CUDA_ATTENTION_CUH_
#define TVM_FLASHINFER_CUDA_ATTENTION_CUH_

#include "../variant.h"
#include "block_layout.cuh"
#include "convert.cuh"
#include "key_fragments.cuh"
#include "launch_params.cuh"
#include "mask.cuh"
#include "merge.cuh"
#include "narrow_operands.cuh"
#include "online_softmax.cuh"
#include "output.cuh"
#include "pipeline.cuh"
#include "producer.cuh"
#include "ptx.cuh"
#include "q_tile.cuh"
#include "query_transform.cuh"
#include "tile_config.cuh"
#include "wide_heads.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Query fragments of a warp: in registers, or read again at every use. */
template <typename C>
class QFragments {
 public:
  __device__ __forceinline__ QFragments(const BlockLayout<C>& at, const Pipeline<C>& pipeline,
                                        int slot)
      : tile_(pipeline.Q(slot)) {
    if constexpr (C::kQInRegisters) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) QTile<C>::Fragment(registers_[k], at, tile_, k);
    }
  }
  __device__ __forceinline__ void Get(uint32_t (&a)[4], const BlockLayout<C>& at, int k) const {
    if constexpr (C::kQInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = registers_[k][i];
    } else {
      QTile<C>::Fragment(a, at, tile_, k);
    }
  }

 private:
  static constexpr int kSteps = C::kHeadDimQK / 16;
  uint32_t registers_[C::kQInRegisters ? kSteps : 1][4];
  uint32_t tile_;
};

/*! \brief s = 0. */
template <typename C>
__device__ __forceinline__ void ZeroLogits(float (&s)[C::kSliceKV / 8][4]) {
#pragma unroll
  for (int n = 0; n < C::kSliceKV / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
  }
}

/*! \brief A fragment of 16 keys' dims [16 k, 16 k + 16): tokens of a slice from `token` on. */
template <typename C>
__device__ __forceinline__ void LoadKeys(uint32_t (&b)[4], const BlockLayout<C>& at,
                                         uint32_t k_tile, int token, int k) {
  const int row = at.slice * C::kSliceKV + token + at.lane % 8 + at.lane / 16 * 8;
  ptx::LdMatrixX4(b, k_tile + C::KTile::Offset(row, k * 2 + at.lane / 8 % 2));
}

/*! \brief The logits of 16 tokens += a product with such a fragment. */
template <typename C>
__device__ __forceinline__ void AddKeys(float (&s)[C::kSliceKV / 8][4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[4], int n) {
  ptx::MmaM16N8K16<typename C::T>(s[2 * n], a, b[0], b[1]);
  ptx::MmaM16N8K16<typename C::T>(s[2 * n + 1], a, b[2], b[3]);
}

/*! \brief s = Q K^T of one slice of a stage. */
template <typename C>
__device__ __forceinline__ void MultiplyQK(float (&s)[C::kSliceKV / 8][4], const QFragments<C>& q,
                                           const BlockLayout<C>& at, uint32_t k_tile) {
  ZeroLogits<C>(s);
#pragma unroll
  for (int k = 0; k < C::kHeadDimQK / 16; ++k) {
    uint32_t a[4];
    q.Get(a, at, k);
#pragma unroll
    for (int n = 0; n < C::kSliceKV / 16; ++n) {
      uint32_t b[4];
      LoadKeys<C>(b, at, k_tile, n * 16, k);
      AddKeys<C>(s, a, b, n);
    }
  }
}

/*! \brief The same of keys that are transformed in registers. */
template <typename C, typename Variant>
__device__ __forceinline__ void MultiplyTransformedQK(float (&s)[C::kSliceKV / 8][4],
                                                      const QFragments<C>& q,
                                                      const BlockLayout<C>& at, uint32_t k_tile,
                                                      const LaunchParams& p,
                                                      const typename Variant::Params& variant,
                                                      const ItemInfo& info, int step) {
  using Transform = KeyTransform<C, Variant>;
  ZeroLogits<C>(s);
#pragma unroll
  for (int n = 0; n < C::kSliceKV / 16; ++n) {
    const Transform keys(p, variant, info, at, step * C::kStepKV + at.slice * C::kSliceKV + n * 16);
#pragma unroll
    for (int k = 0; k < C::kHeadDimQK / 16; ++k) {
      uint32_t a[4], b[4];
      q.Get(a, at, k);
      if constexpr (Transform::kAway > 0) {
        if (16 * k < Variant::kKeyPaired) {
          if (k / Transform::kAway % 2 != 0) continue;  // came with its partner
          uint32_t c[4];
          LoadKeys<C>(b, at, k_tile, n * 16, k);
          LoadKeys<C>(c, at, k_tile, n * 16, k + Transform::kAway);
          keys.Apply(b, c, k);
          AddKeys<C>(s, a, b, n);
          q.Get(a, at, k + Transform::kAway);
          AddKeys<C>(s, a, c, n);
          continue;
        }
      }
      LoadKeys<C>(b, at, k_tile, n * 16, k);
      keys.Apply(b, k);
      AddKeys<C>(s, a, b, n);
    }
  }
}

/*! \brief o += P V of one slice of a stage; probabilities are rounded to the operand type. */
template <typename C>
__device__ __forceinline__ void MultiplyPV(float (&o)[C::kHeadDimVO / 8][4],
                                           const float (&s)[C::kSliceKV / 8][4],
                                           const BlockLayout<C>& at, uint32_t v_tile) {
  using T = typename C::T;
  const int row = at.slice * C::kSliceKV + at.lane % 16;
  const int chunk = at.lane / 16;
#pragma unroll
  for (int k = 0; k < C::kSliceKV / 16; ++k) {
    uint32_t a[4];
    PackRowOperand<T>(a, s[2 * k], s[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < C::kHeadDimVO / 16; ++n) {
      uint32_t b[4];
      ptx::LdMatrixX4Trans(b, v_tile + C::VTile::Offset(k * 16 + row, n * 2 + chunk));
      ptx::MmaM16N8K16<T>(o[2 * n], a, b[0], b[1]);
      ptx::MmaM16N8K16<T>(o[2 * n + 1], a, b[2], b[3]);
    }
  }
}

/*! \brief A consumer warp: every item of the block, as the producers publish them. */
template <typename C, typename Variant>
__device__ __forceinline__ void Consume(const LaunchParams& p,
                                        const typename Variant::Params& variant,
                                        const Pipeline<C>& pipeline) {
  const BlockLayout<C> at;
  const OperandTiles<C, Variant> operands(p, variant, pipeline, at);
  RingCursor<C::kItemSlots> items;
  RingCursor<C::kStages> stages;
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (at.lane == 0) ptx::MbarrierArrive(barrier);
  };
  const LogitScale<Variant> scale(p.sm_scale);

  ptx::WaitForEarlierLaunches();
  while (true) {
    ptx::MbarrierWait(pipeline.ItemFull(items.slot), items.phase);
    const ItemInfo info = *pipeline.Info(items.slot);
    if (info.valid == 0) return;
    const QTile<C> q(p, info.item);
    TransformQueries<C, Variant>(p, variant, q, pipeline, pipeline.Q(items.slot));
    const auto q_fragments = [&] {
      if constexpr (C::kDirect) {
        NarrowQueries<C> queries;
        queries.Load(at, pipeline.smem + (pipeline.Q(items.slot) - pipeline.base));
        return queries;
      } else {
        return QFragments<C>(at, pipeline, items.slot);
      }
    }();
    if constexpr (C::kQInRegisters) release(pipeline.ItemEmpty(items.slot));
    const ItemMask<C, Variant> mask(p, variant, info, q, at);

    OnlineSoftmax<C::kHeadDimVO, Variant::kSoftmax> state;
    const int steps = CeilDiv(info.item.kv_count, C::kStepKV);
    for (int step = 0; step < steps; ++step) {
      if (mask.ClassifyStep(step) == TileClass::kEmpty) continue;
      const TileClass tile = mask.ClassifySlice(step);
      float s[C::kSliceKV / 8][4];
      ptx::MbarrierWait(pipeline.FullK(stages.slot), stages.phase);
      if (tile != TileClass::kEmpty) {
        const uint32_t k_tile = operands.K(info, step, stages.slot);
        if constexpr (C::kDirect) {
          MultiplyNarrowQK<C>(s, q_fragments, at, k_tile);
        } else if constexpr (C::kKeysInRegisters) {
          MultiplyTransformedQK<C, Variant>(s, q_fragments, at, k_tile, p, variant, info, step);
        } else {
          MultiplyQK<C>(s, q_fragments, at, k_tile);
        }
        scale.Apply(s, mask, step);
        if (tile == TileClass::kMixed) mask.Mask(s, step);
        state.Update(s, scale.exponent);
      }
      ptx::MbarrierWait(pipeline.FullV(stages.slot), stages.phase);
      if (tile != TileClass::kEmpty) {
        const uint32_t v_tile = operands.V(info, step, stages.slot);
        if constexpr (C::kDirect) {
          MultiplyNarrowPV<C>(state.o, s, at, v_tile);
        } else {
          MultiplyPV<C>(state.o, s, at, v_tile);
        }
      }
      release(pipeline.Empty(stages.slot));
      stages.Advance();
    }
    if constexpr (!C::kQInRegisters) release(pipeline.ItemEmpty(items.slot));
    items.Advance();

    state.Finish(scale.exponent);
    if constexpr (C::kSlices == 1 && !Variant::kHasOutput) {
      WriteFragments<C, Variant>(p, variant, info.item, q, at, state.o, state.max, state.sum, 0);
    } else {
      MergeSlices<C, Variant>(p, variant, info.item, q, at, state, pipeline.Scratch());
    }
    if (info.item.partial >= 0) {
      MergeCompleted<C, Variant>(p, variant, info.item, pipeline.Scratch());
    }
  }
}

/*!
 * \brief The kernel: one block a worker, as many blocks as the plan's bounds have workers.
 *
 * Reads the plan from device memory, so a captured launch serves every later plan of its bounds.
 * The plan may be read while the launch before still runs: only copies may write plans.
 */
template <typename C, typename Variant>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
    AttentionKernel(const __grid_constant__ LaunchParams p,
                    const __grid_constant__ typename Variant::Params variant) {
  TVM_FLASHINFER_DYNAMIC_SHARED(smem);
  const Pipeline<C> pipeline(smem);
  if (threadIdx.x == 0) pipeline.Init();
  __syncthreads();
  ptx::AllowNextLaunch();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (warp < C::kConsumerWarps) {
    if constexpr (C::kWide) {
      ConsumeWide<C, Variant>(p, variant, pipeline);
    } else {
      Consume<C, Variant>(p, variant, pipeline);
    }
  } else {
    Producer<C, Variant>(p, variant, pipeline, lane).Run(warp - C::kConsumerWarps);
  }
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_ATTENTION_CUH_
