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
#include "warpgroup_consumer_base.cuh"
#include "warpgroup_output.cuh"
#include "warpgroup_pipeline.cuh"

namespace tvm_flashinfer {
namespace cuda {

template <typename C, typename Variant>
class WarpgroupConsumer : private WarpgroupConsumerBase<C, Variant> {
 public:
  using Base = WarpgroupConsumerBase<C, Variant>;
  using T = typename C::T;
  using Base::Base;

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
  using Base::at_, Base::group_, Base::p_, Base::pipeline_, Base::scale_, Base::variant_;
  using Base::Release, Base::Round, Base::Transform;
  using typename Base::Logits;
  using typename Base::Weights;
  using HalfLogits = float[C::kStepKV / 16][4];

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
      const auto start = [&](auto& logits) {
        AwaitTile(pipeline_.FullK(k_.slot), k_.phase);
        MultiplyQK(logits, queries);
        ptx::WgmmaWait<0>();
        ptx::PinRegisters(logits);
        Release(pipeline_.EmptyK(k_.slot));
        k_.Advance();
        Transform(logits, mask, steps.step());
        if (steps.tile() == TileClass::kMixed) mask.Mask(logits, steps.step());
        state.Exponentiate(logits, scale_, rescale);
        Round(logits, weights);
      };
      // Where the chunk ends in the first half of its last step, there are no logits of the other.
      if (info.item.kv_count - steps.step() * C::kStepKV <= C::kStepKV / 2) {
        start(reinterpret_cast<HalfLogits&>(s));
      } else {
        start(s);
      }
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
        AwaitTile(pipeline_.FullK(k_.slot), k_.phase);
        AwaitTurn();
        MultiplyQK(s, queries);
        AwaitTile(pipeline_.FullV(v_.slot), v_.phase);
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
      AwaitTile(pipeline_.FullV(v_.slot), v_.phase);
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
  template <int kTiles>
  __device__ __forceinline__ void MultiplyQK(float (&s)[kTiles][4], uint32_t queries) const {
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

  __device__ __forceinline__ static void AwaitTile(uint32_t full, int phase) {
    ptx::MbarrierWait(full, phase);
    if constexpr (!C::kBoxes) ptx::FenceAsyncProxy();  // rows come by cp.async
  }
  __device__ __forceinline__ void AwaitTurn() const {
    ptx::NamedBarrier(kTurnBarrier + group_, C::kConsumerThreads);
  }
  __device__ __forceinline__ void PassTurn() const {
    ptx::NamedBarrierArrive(kTurnBarrier + (group_ ^ 1), C::kConsumerThreads);
  }
  static constexpr int kTurnBarrier = 2;  //!< the first of two; 1 is that of all consumers
  static_assert(C::kConsumerGroups == 2, "turns alternate");

  RingCursor<C::kStages> k_, v_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WARPGROUP_CONSUMER_CUH_
