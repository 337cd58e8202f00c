// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Gathers query, key and value rows for the warpgroup kernel: cp.async, any page size.
#ifndef TVM_FLASHINFER_CUDA_KV_ROWS_CUH_
#define TVM_FLASHINFER_CUDA_KV_ROWS_CUH_

#include "kv_maps.cuh"
#include "launch_params.cuh"
#include "page_lookup.cuh"
#include "ptx.cuh"
#include "q_tile.cuh"
#include "warpgroup_pipeline.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief Which of 32 rows a lane knows the offset of: such a one that lanes which copy a row
 * together find it by a shuffle among themselves, of the same index in every lane.
 */
template <typename Tile>
__device__ __forceinline__ int LaneRow(int lane) {
  if constexpr (Tile::kChunks > kWarpSize) {
    return lane;
  } else {
    return lane % Tile::kChunks * (kWarpSize / Tile::kChunks) + lane / Tile::kChunks;
  }
}

/*!
 * \brief CopyRows of rows of at most 32 chunks.
 *
 * Addresses of a batch of copies are shuffled before its first: one by one, in the same registers,
 * every shuffle waits for the copy ahead to have read them, and that sets the pace of a kernel.
 */
template <typename Tile, typename T>
__device__ __forceinline__ void CopyNarrowRows(const T* from, int64_t offset, int first_row,
                                               int lane, uint32_t tile) {
  constexpr int kRowsPerCopy = kWarpSize / Tile::kChunks;
  constexpr int kCopiesPerGroup = 8 / kRowsPerCopy;
  constexpr int kBatch = 8;
  static_assert(Tile::kChunks % kBatch == 0, "rows consist of whole batches");
  const int row = lane / Tile::kChunks, chunk = lane % Tile::kChunks;
  const T* column = from + chunk * kElementsPerChunk;
  if (__ballot_sync(0xffffffffu, offset >= 0) == 0xffffffffu) {
    uint32_t to[kCopiesPerGroup];
#pragma unroll
    for (int i = 0; i < kCopiesPerGroup; ++i) {
      to[i] = tile + Tile::Offset(first_row + i * kRowsPerCopy + row, chunk);
    }
#pragma unroll
    for (int first = 0; first < Tile::kChunks; first += kBatch) {
      int64_t at[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        at[i] = __shfl_sync(0xffffffffu, offset, first + i, Tile::kChunks);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int copy = first + i;
        ptx::CpAsync16(to[copy % kCopiesPerGroup] + copy / kCopiesPerGroup * Tile::kGroupBytes,
                       column + at[i]);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < Tile::kChunks; ++i) {
      const int64_t at = __shfl_sync(0xffffffffu, offset, i, Tile::kChunks);
      ptx::CpAsync16OrZero(tile + Tile::Offset(first_row + i * kRowsPerCopy + row, chunk),
                           column + (at < 0 ? 0 : at), at >= 0);
    }
  }
}

/*!
 * \brief Copy 32 rows of a tile, each of which one lane (LaneRow) knows the offset of. Rows that
 * are not there (-1) are zeros: 0 x NaN of a stale row would not be.
 */
template <typename Tile, typename T>
__device__ __forceinline__ void CopyRows(const T* from, int64_t offset, int first_row, int lane,
                                         uint32_t tile) {
  if constexpr (Tile::kChunks > kWarpSize) {
#pragma unroll 4
    for (int i = 0; i < kWarpSize; ++i) {
      const int64_t at = __shfl_sync(0xffffffffu, offset, i);
      for (int chunk = lane; chunk < Tile::kChunks; chunk += kWarpSize) {
        ptx::CpAsync16OrZero(tile + Tile::Offset(first_row + i, chunk),
                             from + (at < 0 ? 0 : at) + chunk * kElementsPerChunk, at >= 0);
      }
    }
  } else {
    CopyNarrowRows<Tile>(from, offset, first_row, lane, tile);
  }
}

/*! \brief One of kQueryWarps warps, the `part`-th: its part of an item's query tile. */
template <typename C, typename Variant>
__device__ __forceinline__ void CopyQueries(const LaunchParams& p, const WorkItem& item,
                                            const WarpgroupPipeline<C>& pipeline, int slot,
                                            int part, int lane) {
  constexpr int kRowsPerWarp = C::kRows / C::kQueryWarps;
  const QTile<C> q(p, item);
#pragma unroll 1
  for (int first = part * kRowsPerWarp; first < (part + 1) * kRowsPerWarp; first += kWarpSize) {
    const int row = first + LaneRow<typename C::QTile>(lane);
    const QueryRow known = DescribeRow<Variant>(p, q, row);
    CopyRows<typename C::QTile>(static_cast<const typename C::T*>(p.q), QueryPlace(p, known), first,
                                lane, pipeline.Q(slot));
    pipeline.Rows(slot)[row] = known;
  }
  ptx::MbarrierArriveAfterCopies(pipeline.QueriesFull(slot));
  __syncwarp();
  if (lane == 0) ptx::MbarrierArrive(pipeline.QueriesFull(slot));
}

/*!
 * \brief One of four producer warps: a quarter of the queries and of every K and V tile.
 *
 * No copy is waited for here: barriers count copies as they end, so that as much is on its way as
 * the rings hold. K is a step ahead of V, as the consumers are (warpgroup_consumer.cuh).
 */
template <typename C, typename Variant>
class RowLoader {
 public:
  using T = typename C::T;

  __device__ __forceinline__ RowLoader(const LaunchParams& p,
                                       const typename Variant::Params& variant, const NoMaps&,
                                       const WarpgroupPipeline<C>& pipeline, int warp, int lane)
      : p_(p), variant_(variant), pipeline_(pipeline), warp_(warp), lane_(lane) {}

  __device__ __forceinline__ void Load(const ItemInfo& info,
                                       const RingCursor<C::kItemSlots>& items) {
    StepsDown<C, Variant> steps(variant_, info);
    TokenPlace place = Find(info, steps.step());
    ptx::WaitForEarlierLaunches();
    CopyQueries<C, Variant>(p_, info.item, pipeline_, items.slot, warp_, lane_);
    if (steps.step() < 0) return;
    steps.Next();
    TokenPlace next = Find(info, steps.step());
    LoadK(info.item, place);
    while (steps.step() >= 0) {
      // Pages are looked up a step ahead.
      steps.Next();
      const TokenPlace ahead = Find(info, steps.step());
      LoadK(info.item, next);
      LoadV(info.item, place);
      place = next;
      next = ahead;
    }
    LoadV(info.item, place);
  }

 private:
  static_assert(C::kProducerWarps * kWarpSize == C::kStepKV,
                "every lane knows the address of one row");
  static_assert(C::KTile::kChunks == C::VTile::kChunks, "a lane knows the same row of both");

  /*! \return The place of this lane's row of a step, or none. */
  __device__ __forceinline__ TokenPlace Find(const ItemInfo& info, int step) const {
    return FindToken(
        p_, p_.plan.kv_indices + info.pages, info.item,
        step < 0 ? -1 : step * C::kStepKV + warp_ * kWarpSize + LaneRow<typename C::KTile>(lane_));
  }

  __device__ __forceinline__ void LoadK(const WorkItem& item, const TokenPlace& place) {
    LoadTile<typename C::KTile>(p_.k, p_.k_strides, item, place, pipeline_.K(k_.slot),
                                pipeline_.EmptyK(k_.slot), pipeline_.FullK(k_.slot), &k_);
  }
  __device__ __forceinline__ void LoadV(const WorkItem& item, const TokenPlace& place) {
    LoadTile<typename C::VTile>(p_.v, p_.v_strides, item, place, pipeline_.V(v_.slot),
                                pipeline_.EmptyV(v_.slot), pipeline_.FullV(v_.slot), &v_);
  }

  /*! \brief This warp's rows of the tile at hand of a ring, once it is empty. */
  template <typename Tile>
  __device__ __forceinline__ void LoadTile(const void* pool, const KVStrides& strides,
                                           const WorkItem& item, const TokenPlace& place,
                                           uint32_t tile, uint32_t empty, uint32_t full,
                                           RingCursor<C::kStages>* ring) const {
    ptx::MbarrierWait(empty, ring->phase ^ 1);
    CopyRows<Tile>(static_cast<const T*>(pool) + item.head * strides.head, place.Offset(strides),
                   warp_ * kWarpSize, lane_, tile);
    ptx::MbarrierArriveAfterCopies(full);
    ring->Advance();
  }

  const LaunchParams& p_;
  const typename Variant::Params& variant_;
  const WarpgroupPipeline<C>& pipeline_;
  int warp_, lane_;
  RingCursor<C::kStages> k_, v_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KV_ROWS_CUH_
