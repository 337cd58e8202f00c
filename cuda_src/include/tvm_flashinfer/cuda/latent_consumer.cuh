// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The consumers of latent attention, whose values are the first columns of their keys. One
// warpgroup computes logits and weights and the first half of the output, the other the second half
// with the weights that it is handed. The next Q K^T is issued ahead of a step's softmax, and the
// other half's P V keeps the tensor cores busy during it.
#ifndef TVM_FLASHINFER_CUDA_LATENT_CONSUMER_CUH_
#define TVM_FLASHINFER_CUDA_LATENT_CONSUMER_CUH_

#include "../params.h"
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
class LatentConsumer : private WarpgroupConsumerBase<C, Variant> {
 public:
  using Base = WarpgroupConsumerBase<C, Variant>;
  using T = typename C::T;
  using Base::Base;

  /*! \brief Every item of the block, as the producers publish them. */
  __device__ __forceinline__ void Run() {
    ptx::WaitForEarlierLaunches();
    if (group_ == 1) FreeMailbox();
    RingCursor<C::kItemSlots> items;
    while (true) {
      ptx::MbarrierWait(pipeline_.RecordFull(items.slot), items.phase);
      const ItemInfo info = *pipeline_.Info(items.slot);
      if (info.valid == 0) return;
      ptx::MbarrierWait(pipeline_.QueriesFull(items.slot), items.phase);
      const QueryRow rows[2] = {pipeline_.Rows(items.slot)[at_.Row(0)],
                                pipeline_.Rows(items.slot)[at_.Row(1)]};
      State state;
      if (group_ == 0) {
        Lead(info, rows, items.slot, &state);
      } else {
        Release(pipeline_.ItemEmpty(items.slot));
        Follow(info, &state);
      }
      WriteRows<C, Variant>(p_, variant_, info.item, rows, at_.lane, state.o, state.max, state.sum,
                            group_ * C::kColumns);
      if (info.item.partial >= 0) {
        MergeCompleted<C, Variant>(p_, variant_, info.item, pipeline_.Scratch());
      }
      items.Advance();
    }
  }

 private:
  using State = OnlineSoftmax<C::kColumns>;
  using Base::at_, Base::group_, Base::p_, Base::pipeline_, Base::scale_, Base::variant_;
  using Base::Release, Base::Round, Base::Transform;
  using typename Base::Logits;
  using typename Base::Weights;

  /*! \brief The warpgroup of logits. */
  __device__ __forceinline__ void Lead(const ItemInfo& info, const QueryRow (&rows)[2], int slot,
                                       State* state) {
    const uint32_t queries = pipeline_.Q(slot);
    ptx::FenceAsyncProxy();  // queries come by cp.async
    const ItemMask<C, Variant> mask(variant_, info, rows, at_);
    StepsDown<C, Variant> steps(variant_, info);
    Logits s;
    if (steps.step() >= 0) {
      MultiplyQK(s, queries);
      ptx::WgmmaWait<0>();
      ptx::PinRegisters(s);
      int step = steps.step();
      TileClass tile = steps.tile();
      for (steps.Next(); steps.step() >= 0; steps.Next()) {
        Logits next;
        MultiplyQK(next, queries);
        Sum(s, mask, step, tile, state);
        ptx::PinRegisters(next);
#pragma unroll
        for (int n = 0; n < C::kStepKV / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] = next[n][e];
        }
        step = steps.step();
        tile = steps.tile();
      }
      Release(pipeline_.ItemEmpty(slot));
      Sum(s, mask, step, tile, state);
    } else {
      Release(pipeline_.ItemEmpty(slot));
    }
    state->Finish(scale_);
    AwaitMailbox(kFree);
    PutFactors(state->max);
    *reinterpret_cast<PerRow*>(Slot(0)) = {{state->sum[0], state->sum[1]}};
    AnnounceMailbox(kReady);
  }

  /*! \brief A step from its logits on: weights, also for the other warpgroup, and P V. */
  __device__ __forceinline__ void Sum(Logits& s, const ItemMask<C, Variant>& mask, int step,
                                      TileClass tile, State* state) {
    Transform(s, mask, step);
    if (tile == TileClass::kMixed) mask.Mask(s, step);
    float rescale[2] = {1.0f, 1.0f};
    const bool rises = state->Exponentiate(s, scale_, rescale);
    Weights weights;
    Round(s, weights);
    Send(weights, rescale);
    if (rises) state->Rescale(rescale);
    MultiplyPV(state->o, weights);
    EndPV(state->o);
  }

  /*! \brief The other one: of the steps' weights, in the same order. */
  __device__ __forceinline__ void Follow(const ItemInfo& info, State* state) {
    Weights weights;
    float rescale[2];
    for (StepsDown<C, Variant> steps(variant_, info); steps.step() >= 0; steps.Next()) {
      Receive(weights, rescale);
      if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
        state->Rescale(rescale);
      }
      ptx::MbarrierWait(pipeline_.FullK(v_.slot), v_.phase);
      MultiplyPV(state->o, weights);
      EndPV(state->o);
    }
    AwaitMailbox(kReady);
    const PerRow sum = *reinterpret_cast<const PerRow*>(Slot(0));
    GetFactors(state->max);
    FreeMailbox();
    state->sum[0] = sum.x[0];
    state->sum[1] = sum.x[1];
  }

  /*! \brief Issue s = Q K^T of the next stage, once it is there. */
  __device__ __forceinline__ void MultiplyQK(Logits& s, uint32_t queries) {
    ptx::MbarrierWait(pipeline_.FullK(k_.slot), k_.phase);
    ptx::WgmmaFence();
#pragma unroll
    for (int k = 0; k < C::kHeadDimQK / 16; ++k) {
      ptx::WgmmaShared<T>(s, C::QTile::Columns(queries, 0, k),
                          C::KTile::Columns(pipeline_.K(k_.slot), 0, k), k > 0);
    }
    ptx::WgmmaCommit();
    k_.Advance();
  }

  /*! \brief Issue o += P V of this warpgroup's columns of the stage at hand. */
  __device__ __forceinline__ void MultiplyPV(float (&o)[C::kColumns / 8][4],
                                             const Weights& weights) const {
    constexpr int kTiles = 16;  // 128 columns a product
    const uint32_t tile =
        pipeline_.K(v_.slot) + group_ * (C::kColumns / 64) * C::KTile::kPanelBytes;
    ptx::WgmmaFence();
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
#pragma unroll
      for (int n = 0; n < C::kColumns / 8; n += kTiles) {
        ptx::WgmmaRegisters<T>(reinterpret_cast<float (&)[kTiles][4]>(o[n]), weights[k],
                               C::KTile::Rows(tile, k, 8 * n));
      }
    }
    ptx::WgmmaCommit();
  }

  /*! \brief Wait for all products, and release the stage of the last P V. */
  __device__ __forceinline__ void EndPV(float (&o)[C::kColumns / 8][4]) {
    ptx::WgmmaWait<0>();
    ptx::PinRegisters(o);
    Release(pipeline_.EmptyK(v_.slot));
    v_.Advance();
  }

  // The mailbox: fragments of weights and factors, thread by thread, as both warpgroups hold the
  // same rows. It holds one step.
  struct alignas(16) Fragment {
    uint32_t x[4];
  };
  struct alignas(8) PerRow {
    float x[2];
  };

  __device__ __forceinline__ void Send(const Weights& weights, const float (&rescale)[2]) const {
    AwaitMailbox(kFree);
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
      *Slot(k) = {{weights[k][0], weights[k][1], weights[k][2], weights[k][3]}};
    }
    PutFactors(rescale);
    AnnounceMailbox(kReady);
  }
  __device__ __forceinline__ void Receive(Weights& weights, float (&rescale)[2]) const {
    AwaitMailbox(kReady);
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
      const Fragment fragment = *Slot(k);
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] = fragment.x[i];
    }
    GetFactors(rescale);
    FreeMailbox();
  }
  __device__ __forceinline__ Fragment* Slot(int k) const {
    return reinterpret_cast<Fragment*>(pipeline_.smem + C::kWeightsOffset) + k * kWarpgroupSize +
           at_.thread % kWarpgroupSize;
  }
  __device__ __forceinline__ float* Factor(int half) const {
    return reinterpret_cast<float*>(pipeline_.smem + C::kFactorsOffset) + at_.Row(half);
  }
  __device__ __forceinline__ void PutFactors(const float (&x)[2]) const {
    if (at_.lane % 4 != 0) return;
    *Factor(0) = x[0];
    *Factor(1) = x[1];
  }
  __device__ __forceinline__ void GetFactors(float (&x)[2]) const {
    x[0] = *Factor(0);
    x[1] = *Factor(1);
  }

  // Named barriers; 1 is that of all consumers.
  static constexpr int kReady = 2, kFree = 3;
  __device__ __forceinline__ void AwaitMailbox(int state) const {
    ptx::NamedBarrier(state, C::kConsumerThreads);
  }
  __device__ __forceinline__ void AnnounceMailbox(int state) const {
    ptx::NamedBarrierArrive(state, C::kConsumerThreads);
  }
  __device__ __forceinline__ void FreeMailbox() const { AnnounceMailbox(kFree); }

  RingCursor<C::kStages> k_, v_;  // of logits; of sums
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LATENT_CONSUMER_CUH_
