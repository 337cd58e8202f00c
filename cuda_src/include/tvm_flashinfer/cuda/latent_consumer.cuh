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
#include "q_tile.cuh"
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
    RingCursor<C::kItemSlots> items;
    bool first = true;
    while (true) {
      ptx::MbarrierWait(pipeline_.RecordFull(items.slot), items.phase);
      const ItemInfo info = *pipeline_.Info(items.slot);
      if (info.valid == 0) return;
      const QTile<C> q(p_, info.item);
      constexpr int kRows = C::kRows / C::kConsumerWarps;
      const int first_row = at_.thread / kWarpSize * kRows;
      const int64_t place = QueryPlace(p_, q.Row(first_row + at_.lane));
      const QueryRow rows[2] = {DescribeRow<Variant>(p_, q, at_.Row(0)),
                                DescribeRow<Variant>(p_, q, at_.Row(1))};
      ptx::WaitForEarlierLaunches();
      Queries queries;
      queries.tile = pipeline_.Q(0);
      LoadLast(rows, &queries);
      q.template CopyRows<kRows>(p_, place, first_row, at_.lane, queries.tile);
      if (first) ptx::NamedBarrierArrive(C::kQueriesAsked, C::kQueriesAskedThreads);
      first = false;
      State state;
      Sum(info, rows, queries, items.slot, &state);
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

  // Products of a Q K^T, 16 dims each: those with queries in shared memory, and those of a part.
  static constexpr int kSharedK = (C::kHeadDimQK - C::kRegisterDims) / 16;
  static constexpr int kPartK = C::kHeadDimQK / 16 / C::kParts;

  /*! \brief An item's queries: a tile in shared memory, and the last dims of this thread's rows. */
  struct Queries {
    uint32_t tile;
    uint32_t last[C::kRegisterDims / 16][4];
  };

  /*! \brief An item's state. Steps are this warpgroup's and the other's in turn. */
  __device__ __forceinline__ void Sum(const ItemInfo& info, const QueryRow (&rows)[2],
                                      const Queries& queries, int slot, State* state) {
    BlockLayout<C> whole = at_;
    whole.slice = 0;  // either warpgroup has logits of whole steps
    const Mask mask(variant_, info, rows, whole);
    ptx::WaitForCopies();
    ptx::FenceAsyncProxy();
    Pipeline<C>::SyncConsumers();  // the tile is there
    bool more = Steps(variant_, info).step() >= 0;
    if (more && group_ == 1) {
      more = Stage(summed_).followers > 0;
      SumOther(state);
    }
    if (more) SumSteps(mask, queries, state);
    Release(pipeline_.ItemEmpty(slot));
    state->Finish(scale_);
    AddSums(state->sum);
  }

  /*! \brief A step of this warpgroup's: its logits, and what becomes of them. */
  struct Own {
    Logits s;
    StageRecord stage;
    Weights weights;
  };

  /*! \brief The steps that are left, from one of this warpgroup's on. */
  __device__ __forceinline__ void SumSteps(const Mask& mask, const Queries& queries, State* state) {
    Own own;
    MultiplyQK(&own, queries, summed_);
    ptx::WgmmaWait<0>();
    ptx::PinRegisters(own.s);
    Weigh(mask, &own, state);
    while (true) {
      MultiplyOwnPV(own.weights, state);
      EndPV(state);  // before keys are waited for: theirs may be the place to fill
      if (own.stage.followers < 2) break;
      Cursor keys = summed_;
      keys.Advance();
      MultiplyQK(&own, queries, keys);
      MultiplyOthersPV(state);
      EndPV(state);
      ptx::PinRegisters(own.s);
      Weigh(mask, &own, state);
    }
    if (own.stage.followers == 1) SumOther(state);
  }

  /*! \brief The whole of a step of the other's. */
  __device__ __forceinline__ void SumOther(State* state) {
    MultiplyOthersPV(state);
    EndPV(state);
  }

  /*! \brief Weights from logits, also for the other warpgroup; no products are in flight. */
  __device__ __forceinline__ void Weigh(const Mask& mask, Own* own, State* state) const {
    Transform(own->s, mask, own->stage.step);
    if (own->stage.tile == TileClass::kMixed) mask.Mask(own->s, own->stage.step);
    state->Update(own->s, scale_);
    Round(own->s, own->weights);
    Send(own->weights, state->max);
  }

  /*! \brief What the tile does not hold. */
  __device__ __forceinline__ void LoadLast(const QueryRow (&rows)[2], Queries* queries) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t place = QueryPlace(p_, rows[h]);
      const bool exists = place >= 0;
      const T* from = static_cast<const T*>(p_.q) + kSharedK * 16 + at_.lane % 4 * 2;
      if (exists) from += place;
#pragma unroll
      for (int i = 0; i < C::kRegisterDims / 8; ++i) {
        queries->last[i / 2][i % 2 * 2 + h] =
            exists ? *reinterpret_cast<const uint32_t*>(from + i * 8) : 0;
      }
    }
  }

  /*! \brief What is in a stage, once its first part is there. */
  __device__ __forceinline__ StageRecord Stage(const Cursor& stage) const {
    ptx::MbarrierWait(pipeline_.FullK(stage.slot), stage.phase);
    return *pipeline_.Stage(stage.slot);
  }

  /*! \brief Issue s = Q K^T of a stage, as its parts arrive. */
  __device__ __forceinline__ void MultiplyQK(Own* own, const Queries& queries,
                                             const Cursor& keys) const {
    own->stage = Stage(keys);
#pragma unroll
    for (int part = 0; part < C::kParts; ++part) {
      if (part > 0) ptx::MbarrierWait(pipeline_.FullK(keys.slot, part), keys.phase);
      ptx::WgmmaFence();
#pragma unroll
      for (int k = part * kPartK; k < (part + 1) * kPartK; ++k) {
        const uint64_t columns = C::KTile::Columns(pipeline_.K(keys.slot), 0, k);
        if (k < kSharedK) {
          ptx::WgmmaShared<T>(own->s, C::QTile::Columns(queries.tile, 0, k), columns, k > 0);
        } else {
          ptx::WgmmaMixed<T>(own->s, queries.last[k - kSharedK], columns);
        }
      }
    }
    ptx::WgmmaCommit();
  }

  /*!
   * \brief Issue o += P V of this warpgroup's columns of the next stage.
   * \param multiply Called with 128 columns of o, a product's index and its operand's descriptor.
   */
  template <typename F>
  __device__ __forceinline__ void MultiplyPV(float (&o)[C::kColumns / 8][4], F multiply) {
    constexpr int kTiles = 16;
    const uint32_t tile =
        pipeline_.K(summed_.slot) + group_ * (C::kColumns / 64) * C::KTile::kPanelBytes;
    ptx::PinRegisters(o);  // or the first ones are cleared after the fence
    ptx::WgmmaFence();
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
#pragma unroll
      for (int n = 0; n < C::kColumns / 8; n += kTiles) {
        multiply(reinterpret_cast<float (&)[kTiles][4]>(o[n]), k, C::KTile::Rows(tile, k, 8 * n));
      }
    }
    ptx::WgmmaCommit();
    summed_.Advance();
  }
  /*! \brief Of this warpgroup's step, whose stage was waited for by its Q K^T. */
  __device__ __forceinline__ void MultiplyOwnPV(const Weights& weights, State* state) {
    MultiplyPV(state->o, [&](float (&o)[16][4], int k, uint64_t values) {
      ptx::WgmmaRegisters<T>(o, weights[k], values);
    });
  }
  /*! \brief Of a step of the other's, under whose maxima the state is brought. */
  __device__ __forceinline__ void MultiplyOthersPV(State* state) {
    ptx::NamedBarrier(kSent + (group_ ^ 1), C::kConsumerThreads);
    const PerRow max = *OfRows(C::kMaximaOffset);
    float rescale[2];
    if (state->Raise(max.x, scale_, 0.0f, rescale)) state->Rescale(rescale);
    const uint32_t weights =
        pipeline_.base + C::kWeightsOffset;  // who sent them saw the stage full
    MultiplyPV(state->o, [&](float (&o)[16][4], int k, uint64_t values) {
      ptx::WgmmaSharedKN<T>(o, C::WeightsTile::Columns(weights, k), values);
    });
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

  // The mailbox: weights, and the maxima of a thread's two rows under which they were made. It
  // holds one step: who has multiplied a step's writes the next.
  struct alignas(8) PerRow {
    float x[2];
  };

  __device__ __forceinline__ void Send(const Weights& weights, const float (&max)[2]) const {
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<uint32_t*>(pipeline_.smem + C::kWeightsOffset +
                                     C::WeightsTile::Offset(at_.warp_q * 2 + i % 2, k * 2 + i / 2) +
                                     at_.lane * 4) = weights[k][i];
      }
    }
    if (at_.lane % 4 == 0) *OfRows(C::kMaximaOffset) = {{max[0], max[1]}};
    ptx::FenceAsyncProxy();
    ptx::NamedBarrierArrive(kSent + group_, C::kConsumerThreads);
  }
  /*! \brief Complete the sums of rows, of which each warpgroup has those of its steps. */
  __device__ __forceinline__ void AddSums(float (&sum)[2]) const {
    if (at_.lane % 4 == 0) *OfRows(C::kSumsOffset, group_) = {{sum[0], sum[1]}};
    Pipeline<C>::SyncConsumers();
    const PerRow other = *OfRows(C::kSumsOffset, group_ ^ 1);
    Pipeline<C>::SyncConsumers();  // the next item's take their place
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] += other.x[h];
  }
  /*! \brief This thread's rows, which three others have too, in the i-th of arrays of rows. */
  __device__ __forceinline__ PerRow* OfRows(int offset, int i = 0) const {
    return reinterpret_cast<PerRow*>(pipeline_.smem + offset) +
           (i * kWarpgroupSize + at_.thread % kWarpgroupSize) / 4;
  }

  static constexpr int kSent = 2;  //!< the first of two named barriers; 1 is that of all consumers

  Cursor summed_, released_;  //!< the next stage to be so
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LATENT_CONSUMER_CUH_
