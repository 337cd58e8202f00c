// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The consumers of the warpgroup kernel. Each warpgroup keeps the tensor cores busy in two ways
// (FlashAttention-3, section 3): the next Q K^T runs beside the softmax of the step before and its
// P V, and the warpgroups take turns in issuing products, so that one's softmax runs beside the
// other's products.
#ifndef TVM_FLASHINFER_CUDA_WARPGROUP_CONSUMER_CUH_
#define TVM_FLASHINFER_CUDA_WARPGROUP_CONSUMER_CUH_

#include <type_traits>

#include "../params.h"
#include "block_layout.cuh"
#include "mask.cuh"
#include "merge.cuh"
#include "online_softmax.cuh"
#include "ptx.cuh"
#include "query_row.cuh"
#include "warpgroup_output.cuh"
#include "warpgroup_pipeline.cuh"

namespace tvm_flashinfer {
namespace cuda {

template <typename C, typename Variant>
class WarpgroupConsumer {
 public:
  using VariantParams = typename Variant::Params;
  using T = typename C::T;

  __device__ __forceinline__ WarpgroupConsumer(const AttentionParams& p,
                                               const VariantParams& variant,
                                               const WarpgroupPipeline<C>& pipeline)
      : p_(p), variant_(variant), pipeline_(pipeline) {
    // The same in all lanes, which the compiler sees only so.
    group_ = __shfl_sync(0xffffffffu, at_.thread / kWarpgroupSize, 0);
    // A scale of any sign: maxima are of logits under a positive one.
    const float scale = Variant::kHasLogits ? 1.0f : p.sm_scale * kLog2e;
    sign_ = scale < 0.0f ? -1.0f : scale == 0.0f ? 0.0f : 1.0f;
    scale_ = scale == 0.0f ? 1.0f : fabsf(scale);
  }

  /*! \brief Every item of the block, as the producers publish them. */
  __device__ __forceinline__ void Run() {
    ptx::WaitForEarlierLaunches();
    if (group_ == 1) PassTurn();  // the first turn is warpgroup 0's
    RingCursor<C::kItemSlots> items;
    while (true) {
      ptx::MbarrierWait(pipeline_.RecordFull(items.slot), items.phase);
      const ItemInfo info = *pipeline_.Info(items.slot);
      if (info.valid == 0) return;
      Item(info, items);
      items.Advance();
    }
  }

 private:
  using State = OnlineSoftmax<C::kHeadDimVO>;
  using Logits = float[C::kStepKV / 8][4];
  using Weights = uint32_t[C::kStepKV / 16][4];

  __device__ __forceinline__ void Item(const ItemInfo& info,
                                       const RingCursor<C::kItemSlots>& items) {
    const uint32_t queries = pipeline_.Q(items.slot);
    State state;
    Logits s;
    Weights weights;
    float rescale[2];
    StepsDown<C, Variant> steps(variant_, info);
    ptx::MbarrierWait(pipeline_.QueriesFull(items.slot), items.phase);
    ptx::FenceAsyncProxy();  // queries come by cp.async
    const QueryRow rows[2] = {pipeline_.Rows(items.slot)[at_.Row(0)],
                              pipeline_.Rows(items.slot)[at_.Row(1)]};
    const ItemMask<C, Variant> mask(variant_, info, rows, at_);
    if (steps.step() >= 0) {
      ptx::MbarrierWait(pipeline_.FullK(k_.slot), k_.phase);
      MultiplyQK(s, queries);
      ptx::WgmmaWait<0>();
      ptx::PinRegisters(s);
      Release(pipeline_.EmptyK(k_.slot));
      k_.Advance();
      Transform(s, mask, steps.step());
      if (steps.tile() == TileClass::kMixed) mask.Mask(s, steps.step());
      state.Exponentiate(s, scale_, rescale);
      Round(s, weights);
      // The rest of a step, twice: one that masks needs registers that the other must not give.
      const auto finish = [&](auto mixed) {
        Transform(s, mask, steps.step());
        if constexpr (mixed.value) mask.Mask(s, steps.step());
        const bool rises = state.Exponentiate(s, scale_, rescale);
        ptx::PinRegisters(s);
        // Waits on both sides of a branch: a wait before it would be moved ahead of the
        // exponentials.
        if (rises) {
          ptx::WgmmaWait<0>();
          ptx::PinRegisters(state.o);
          state.Rescale(rescale);
        } else {
          ptx::WgmmaWait<0, 1>();
          ptx::PinRegisters(state.o);
        }
        Release(pipeline_.EmptyV(v_.slot));
        v_.Advance();
        Round(s, weights);
      };
      for (steps.Next(); steps.step() >= 0; steps.Next()) {
        ptx::MbarrierWait(pipeline_.FullK(k_.slot), k_.phase);
        AwaitTurn();
        MultiplyQK(s, queries);
        ptx::MbarrierWait(pipeline_.FullV(v_.slot), v_.phase);
        MultiplyPV(state.o, weights);
        PassTurn();
        ptx::WgmmaWait<1>();
        ptx::PinRegisters(s);
        Release(pipeline_.EmptyK(k_.slot));
        k_.Advance();
        if (steps.tile() == TileClass::kMixed) {
          finish(std::true_type{});
        } else {
          finish(std::false_type{});
        }
      }
      Release(pipeline_.ItemEmpty(items.slot));
      ptx::MbarrierWait(pipeline_.FullV(v_.slot), v_.phase);
      MultiplyPV(state.o, weights);
      ptx::WgmmaWait<0>();
      ptx::PinRegisters(state.o);
      Release(pipeline_.EmptyV(v_.slot));
      v_.Advance();
    } else {
      Release(pipeline_.ItemEmpty(items.slot));
    }
    state.Finish(scale_);
    WriteRows<C, Variant>(p_, variant_, info.item, rows, at_.lane, state.o, state.max, state.sum);
    if (info.item.partial >= 0) {
      MergeCompleted<C, Variant>(p_, variant_, info.item, pipeline_.Scratch());
    }
  }

  /*! \brief Issue s = Q K^T of the K tile at hand. */
  __device__ __forceinline__ void MultiplyQK(Logits& s, uint32_t queries) const {
    ptx::WgmmaFence();
#pragma unroll
    for (int k = 0; k < C::kHeadDimQK / 16; ++k) {
      ptx::WgmmaShared<T>(s, C::QTile::Columns(queries, group_ * 64, k),
                          C::KTile::Columns(pipeline_.K(k_.slot), 0, k), k > 0);
    }
    ptx::WgmmaCommit();
  }

  /*! \brief Issue o += P V of the V tile at hand. */
  __device__ __forceinline__ void MultiplyPV(float (&o)[C::kHeadDimVO / 8][4],
                                             const Weights& weights) const {
    ptx::WgmmaFence();
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
      ptx::WgmmaRegisters<T>(o, weights[k], C::VTile::Rows(pipeline_.V(v_.slot), k));
    }
    ptx::WgmmaCommit();
  }

  /*! \brief The variant's transform, or the scale's sign. */
  __device__ __forceinline__ void Transform(Logits& s, const ItemMask<C, Variant>& mask,
                                            int step) const {
    if constexpr (Variant::kHasLogits) {
      mask.Transform(s, step, p_.sm_scale);
    } else if (sign_ != 1.0f) {
#pragma unroll
      for (int n = 0; n < C::kStepKV / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= sign_;
      }
    }
  }

  /*! \brief Probabilities as fragments of the operand type. */
  __device__ __forceinline__ static void Round(const Logits& s, Weights& weights) {
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = s[2 * k + i / 2] + i % 2 * 2;
        weights[k][i] = ptx::Pack2<T>(pair[0], pair[1]);
      }
    }
  }

  __device__ __forceinline__ void Release(uint32_t barrier) const {
    __syncwarp();
    if (at_.lane == 0) ptx::MbarrierArrive(barrier);
  }

  __device__ __forceinline__ void AwaitTurn() const {
    ptx::NamedBarrier(kTurnBarrier + group_, C::kConsumerThreads);
  }
  __device__ __forceinline__ void PassTurn() const {
    ptx::NamedBarrierArrive(kTurnBarrier + (group_ ^ 1), C::kConsumerThreads);
  }
  static constexpr int kTurnBarrier = 2;  //!< the first of two; 1 is that of all consumers
  static_assert(C::kConsumerGroups == 2, "turns alternate");

  const AttentionParams& p_;
  const VariantParams& variant_;
  const WarpgroupPipeline<C>& pipeline_;
  const BlockLayout<C> at_;
  int group_;  //!< warpgroup among the consumers
  float scale_, sign_;
  RingCursor<C::kStages> k_, v_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WARPGROUP_CONSUMER_CUH_
