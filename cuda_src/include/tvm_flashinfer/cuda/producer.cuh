// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The producer warps. One takes work items, publishes their records and loads K; the others follow
// the records and load the rest. None waits for the end of an item.
#ifndef TVM_FLASHINFER_CUDA_PRODUCER_CUH_
#define TVM_FLASHINFER_CUDA_PRODUCER_CUH_

#include "item_reader.cuh"
#include "kv_gather.cuh"
#include "launch_params.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"
#include "q_tile.cuh"
#include "work_queue.cuh"

namespace tvm_flashinfer {
namespace cuda {

template <typename C, typename Variant>
class Producer {
 public:
  using VariantParams = typename Variant::Params;

  __device__ __forceinline__ Producer(const LaunchParams& p, const VariantParams& variant,
                                      const Pipeline<C>& pipeline, int lane)
      : p_(p), variant_(variant), pipeline_(pipeline), lane_(lane) {}

  /*! \param producer This warp among the producers. */
  __device__ __forceinline__ void Run(int producer) {
    if (producer == 0) {
      Lead();
    } else if (producer < C::kLoaders) {
      Follow(
          [&](const ItemInfo& info, int) {
            const KGather gather(p_, p_.k, p_.k_strides, info, lane_, producer);
            LoadK(info, gather, gather.Resolve(0), [] {});
          },
          [](int) {});
    } else {
      LoadValues(producer - C::kLoaders);
    }
  }

 private:
  using KGather = KVGather<C, typename C::KRing>;
  using VGather = KVGather<C, typename C::VRing>;

  __device__ __forceinline__ void Lead() {
    WorkQueue queue(p_.plan);
    RingCursor<C::kItemSlots> items;
    ItemInfo next;
    next.valid = ReadItem<Variant>(p_, &queue, lane_, &next);
    while (next.valid != 0) {
      const ItemInfo info = next;
      const KGather gather(p_, p_.k, p_.k_strides, info, lane_, 0);
      const auto rows = gather.Resolve(0);
      Publish(info, &items);
      LoadK(info, gather, rows, [&] { next.valid = ReadItem<Variant>(p_, &queue, lane_, &next); });
    }
    Publish(next, &items);
  }

  /*! \brief V, and by the first warp queries, which the lead would load keys later for. */
  __device__ __forceinline__ void LoadValues(int part) {
    const auto arrive = [&](int slot) {
      if (part == 0) Arrive(pipeline_.ItemFull(slot));
    };
    Follow(
        [&](const ItemInfo& info, int slot) {
          const QTile<C> q(p_, info.item);
          const int64_t place = part == 0 ? QueryPlace(p_, q.Row(lane_)) : -1;
          const auto load_queries = [&] {
            if (part == 0) q.Load(p_, place, lane_, pipeline_.Q(slot));
            arrive(slot);
          };
          if constexpr (C::Form::kSharedKV) {
            ptx::WaitForEarlierLaunches();
            load_queries();
          } else {
            const VGather gather(p_, p_.v, p_.v_strides, info, lane_, part);
            LoadSteps(
                info, gather, gather.Resolve(0), [&](int slot) { return pipeline_.V(slot); },
                [&](int slot) { return pipeline_.FullV(slot); }, load_queries, [] {});
          }
        },
        arrive);
  }

  /*!
   * \param load Called with an item and its slot, as the lead hands them out.
   * \param end Called with the slot of the record that ends them.
   */
  template <typename F, typename G>
  __device__ __forceinline__ void Follow(F load, G end) {
    RingCursor<C::kItemSlots> items;
    while (true) {
      ptx::MbarrierWait(pipeline_.RecordFull(items.slot), items.phase);
      const ItemInfo info = *pipeline_.Info(items.slot);
      __syncwarp();
      if (lane_ == 0) ptx::MbarrierArrive(pipeline_.ItemEmpty(items.slot));
      if (info.valid == 0) return end(items.slot);
      load(info, items.slot);
      items.Advance();
    }
  }

  /*! \param read_ahead See LoadSteps. */
  template <typename F>
  __device__ __forceinline__ void LoadK(const ItemInfo& info, const KGather& gather,
                                        const typename KGather::Rows& rows, F read_ahead) {
    LoadSteps(
        info, gather, rows, [&](int slot) { return pipeline_.K(slot); },
        [&](int slot) { return pipeline_.FullK(slot); }, [] {}, read_ahead);
  }

  /*! Copies arrive by themselves; plain stores of any lane are covered by lane 0's arrival. */
  __device__ __forceinline__ void Arrive(uint32_t barrier) const {
    ptx::MbarrierArriveAfterCopies(barrier);
    __syncwarp();
    if (lane_ == 0) ptx::MbarrierArrive(barrier);
  }

  /*! \brief Hand out an item's record; one that is not valid ends consumers and producers. */
  __device__ __forceinline__ void Publish(const ItemInfo& info,
                                          RingCursor<C::kItemSlots>* items) const {
    ptx::MbarrierWait(pipeline_.ItemEmpty(items->slot), items->phase ^ 1);
    if (lane_ == 0) {
      *pipeline_.Info(items->slot) = info;
      ptx::MbarrierArrive(pipeline_.RecordFull(items->slot));
    }
    items->Advance();
  }

  /*!
   * \brief Load an operand of an item. While earlier launches end, the first step of the block is
   * brought to the L2 cache: copies to shared memory must wait, for those launches may write what
   * is copied. What can be worked out beforehand is: nothing of the pool is on its way until then.
   * \param before Called before the first copy, when earlier launches have ended.
   * \param read_ahead Called once as many copies are on their way as the ring holds: what it waits
   * for costs nothing.
   */
  template <typename Gather, typename Tile, typename Full, typename Before, typename ReadAhead>
  __device__ __forceinline__ void LoadSteps(const ItemInfo& info, const Gather& gather,
                                            typename Gather::Rows rows, Tile tile, Full full,
                                            Before before, ReadAhead read_ahead) {
    const int steps = CeilDiv(info.item.kv_count, C::kStepKV);
    bool begun = false;
    const auto begin = [&] {
      if (begun) return;
      ptx::WaitForEarlierLaunches();
      before();
      begun = true;
    };
    if (first_) {
      gather.Prefetch(rows);
    } else {
      begin();
    }
    first_ = false;
    for (int step = 0; step < steps; ++step) {
      const auto ahead = gather.Resolve(step + 1);
      if (ClassifyTokens<Variant>(variant_, info, step * C::kStepKV, C::kStepKV) !=
          TileClass::kEmpty) {
        const auto places = gather.Locate(rows);
        begin();
        ptx::MbarrierWait(pipeline_.Empty(stages_.slot), stages_.phase ^ 1);
        gather.Load(places, tile(stages_.slot));
        Arrive(full(stages_.slot));
        stages_.Advance();
      }
      rows = ahead;
      if (step + 1 == min(steps, C::kStages)) read_ahead();
    }
    begin();
    if (steps == 0) read_ahead();
  }

  const LaunchParams& p_;
  const VariantParams& variant_;
  const Pipeline<C>& pipeline_;
  int lane_;
  RingCursor<C::kStages> stages_;
  bool first_ = true;  //!< no item has been loaded yet
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_PRODUCER_CUH_
