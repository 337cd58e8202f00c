// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The consumers of latent attention, whose values are the first columns of their keys. Each of two
// warpgroups sums one half of the values, and they make the logits and weights of steps in turn and
// hand each other the weights, so that one's softmax runs beside the other's products.
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
    RingCursor<C::kItemSlots> items;
    while (true) {
      ptx::MbarrierWait(pipeline_.RecordFull(items.slot), items.phase);
      const ItemInfo info = *pipeline_.Info(items.slot);
      if (info.valid == 0) return;
      ptx::MbarrierWait(pipeline_.QueriesFull(items.slot), items.phase);
      const QueryRow rows[2] = {pipeline_.Rows(items.slot)[at_.Row(0)],
                                pipeline_.Rows(items.slot)[at_.Row(1)]};
      State state;
      Sum(info, rows, items.slot, &state);
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
  using Steps = StepsDown<C, Variant>;
  using Mask = ItemMask<C, Variant>;
  using Cursor = RingCursor<C::kStages>;

  // Products of a Q K^T, 16 dims each: all of them, and the first part.
  static constexpr int kLastK = C::kHeadDimQK / 16, kFirstK = 24;

  /*! \brief An item's state. Steps are this warpgroup's and the other's in turn. */
  __device__ __forceinline__ void Sum(const ItemInfo& info, const QueryRow (&rows)[2], int slot,
                                      State* state) {
    ptx::FenceAsyncProxy();  // queries come by cp.async
    BlockLayout<C> whole = at_;
    whole.slice = 0;  // either warpgroup has logits of whole steps
    const Mask mask(variant_, info, rows, whole);
    const uint32_t queries = pipeline_.Q(slot);
    Steps steps(variant_, info);
    if (group_ == 1 && steps.step() >= 0) {
      steps.Next();
      SumOther(state);
    }
    if (steps.step() >= 0) {
      Own own;
      MultiplyFirstQK(own.s, queries, summed_);
      MultiplyQK<kFirstK, kLastK>(own.s, queries, summed_);
      bool follows = MoveOn(&steps, &own);
      ptx::WgmmaWait<0>();
      ptx::PinRegisters(own.s);
      Weigh(mask, &own, state);
      while (steps.step() >= 0) {
        SumOwnAndOther(mask, queries, &steps, &own, state, &follows);
      }
      Release(pipeline_.ItemEmpty(slot));
      MultiplyOwnPV(own, state);
      EndPV(state);
      if (follows) SumOther(state);
    } else {
      Release(pipeline_.ItemEmpty(slot));
    }
    state->Finish(scale_);
    AddSums(state->sum);
  }

  /*! \brief A step of this warpgroup's: its logits, and what becomes of them. */
  struct Own {
    Logits s;
    int step;
    TileClass tile;
    Weights weights;
    float rescale[2];
    bool rises;
  };

  /*!
   * \brief Note the step at hand, and move on to this warpgroup's next.
   * \return Whether the other has one before that.
   */
  __device__ __forceinline__ static bool MoveOn(Steps* steps, Own* own) {
    own->step = steps->step();
    own->tile = steps->tile();
    steps->Next();
    if (steps->step() < 0) return false;
    steps->Next();
    return true;
  }

  /*! \brief Weights from logits, also for the other warpgroup. */
  __device__ __forceinline__ void Weigh(const Mask& mask, Own* own, State* state) const {
    Transform(own->s, mask, own->step);
    if (own->tile == TileClass::kMixed) mask.Mask(own->s, own->step);
    own->rises = state->Exponentiate(own->s, scale_, own->rescale);
    Round(own->s, own->weights);
    Send(own->weights, state->max);
  }

  /*! \brief P V of the step in `own` and of the other's after it, and weights of the next own. */
  __device__ __forceinline__ void SumOwnAndOther(const Mask& mask, uint32_t queries, Steps* steps,
                                                 Own* own, State* state, bool* follows) {
    Cursor keys = summed_;
    keys.Advance();
    keys.Advance();
    MultiplyOwnPV(*own, state);
    // A warp is held up until its products are taken: a part first, and the stage of the products
    // before them is released in time.
    MultiplyFirstQK(own->s, queries, keys);
    ptx::WgmmaWait<1>();
    ptx::PinRegisters(state->o);
    ReleaseStage();
    MultiplyQK<kFirstK, kLastK>(own->s, queries, keys);
    *follows = MoveOn(steps, own);
    Weights others;
    Receive(others, state);
    AwaitStage(summed_);
    MultiplyPV(state->o, others);
    ptx::WgmmaWait<1>();
    ptx::PinRegisters(own->s);
    Weigh(mask, own, state);
    EndPV(state);
  }

  /*! \brief The whole of a step of the other's. */
  __device__ __forceinline__ void SumOther(State* state) {
    Weights weights;
    Receive(weights, state);
    AwaitStage(summed_);
    MultiplyPV(state->o, weights);
    EndPV(state);
  }

  __device__ __forceinline__ void MultiplyOwnPV(const Own& own, State* state) {
    if (own.rises) state->Rescale(own.rescale);
    MultiplyPV(state->o, own.weights);  // the stage was waited for by its Q K^T
  }

  /*! \brief Issue the first part of a stage's Q K^T, once it is there. */
  __device__ __forceinline__ void MultiplyFirstQK(Logits& s, uint32_t queries,
                                                  const Cursor& keys) const {
    AwaitStage(keys);
    MultiplyQK<0, kFirstK>(s, queries, keys);
  }
  /*! \brief Issue products [kBegin, kEnd) of s = Q K^T of a stage. */
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void MultiplyQK(Logits& s, uint32_t queries,
                                             const Cursor& keys) const {
    ptx::WgmmaFence();
#pragma unroll
    for (int k = kBegin; k < kEnd; ++k) {
      ptx::WgmmaShared<T>(s, C::QTile::Columns(queries, 0, k),
                          C::KTile::Columns(pipeline_.K(keys.slot), 0, k), k > 0);
    }
    ptx::WgmmaCommit();
  }

  /*! \brief Issue o += P V of this warpgroup's columns of the next stage. */
  __device__ __forceinline__ void MultiplyPV(float (&o)[C::kColumns / 8][4],
                                             const Weights& weights) {
    constexpr int kTiles = 16;  // 128 columns a product
    const uint32_t tile =
        pipeline_.K(summed_.slot) + group_ * (C::kColumns / 64) * C::KTile::kPanelBytes;
    ptx::PinRegisters(o);  // or the first ones are cleared after the fence
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
    summed_.Advance();
  }

  __device__ __forceinline__ void AwaitStage(const Cursor& stage) const {
    ptx::MbarrierWait(pipeline_.FullK(stage.slot), stage.phase);
  }
  /*! \brief Wait for all products, and release the last stage. */
  __device__ __forceinline__ void EndPV(State* state) {
    ptx::WgmmaWait<0>();
    ptx::PinRegisters(state->o);
    ReleaseStage();
  }
  __device__ __forceinline__ void ReleaseStage() {
    Release(pipeline_.EmptyK(released_.slot));
    released_.Advance();
  }

  // The mailbox: weights, and the rows' maxima under which they were made, thread by thread, as
  // both warpgroups hold the same rows. It holds one step: who has read a step's writes the next.
  struct alignas(16) Fragment {
    uint32_t x[4];
  };
  struct alignas(8) PerRow {
    float x[2];
  };

  __device__ __forceinline__ void Send(const Weights& weights, const float (&max)[2]) const {
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
      *At<Fragment>(C::kWeightsOffset,
                    k) = {{weights[k][0], weights[k][1], weights[k][2], weights[k][3]}};
    }
    *At<PerRow>(C::kMaximaOffset) = {{max[0], max[1]}};
    ptx::NamedBarrierArrive(kSent + group_, C::kConsumerThreads);
  }
  /*! \brief The other's weights, under whose maxima the state is brought. */
  __device__ __forceinline__ void Receive(Weights& weights, State* state) const {
    ptx::NamedBarrier(kSent + (group_ ^ 1), C::kConsumerThreads);
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
      const Fragment fragment = *At<Fragment>(C::kWeightsOffset, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] = fragment.x[i];
    }
    const PerRow max = *At<PerRow>(C::kMaximaOffset);
    float rescale[2];
    if (state->Raise(max.x, scale_, 0.0f, rescale)) state->Rescale(rescale);
  }
  /*! \brief Complete the sums of rows, of which each warpgroup has those of its steps. */
  __device__ __forceinline__ void AddSums(float (&sum)[2]) const {
    *At<PerRow>(C::kSumsOffset, group_) = {{sum[0], sum[1]}};
    Pipeline<C>::SyncConsumers();
    const PerRow other = *At<PerRow>(C::kSumsOffset, group_ ^ 1);
    Pipeline<C>::SyncConsumers();  // the next item's take their place
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] += other.x[h];
  }
  /*! \brief This thread's place in the i-th of arrays of one element a thread. */
  template <typename E>
  __device__ __forceinline__ E* At(int offset, int i = 0) const {
    return reinterpret_cast<E*>(pipeline_.smem + offset) + i * kWarpgroupSize +
           at_.thread % kWarpgroupSize;
  }

  static constexpr int kSent = 2;  //!< the first of two named barriers; 1 is that of all consumers

  Cursor summed_, released_;  //!< the next stage to be so
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LATENT_CONSUMER_CUH_
