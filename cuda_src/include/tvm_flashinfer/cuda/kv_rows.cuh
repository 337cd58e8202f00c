// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Gathers query, key and value rows for the warpgroup kernel: cp.async, any page size.
#ifndef TVM_FLASHINFER_CUDA_KV_ROWS_CUH_
#define TVM_FLASHINFER_CUDA_KV_ROWS_CUH_

#include "../params.h"
#include "kv_maps.cuh"
#include "page_lookup.cuh"
#include "ptx.cuh"
#include "q_tile.cuh"
#include "warpgroup_pipeline.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief CopyRows of rows of at most 32 chunks. */
template <typename Tile, typename T>
__device__ __forceinline__ void CopyNarrowRows(const T* from, int64_t offset, int first_row,
                                               int lane, uint32_t tile) {
  constexpr int kRowsPerCopy = kWarpSize / Tile::kChunks;
  constexpr int kCopiesPerGroup = 8 / kRowsPerCopy;
  const int row = lane / Tile::kChunks, chunk = lane % Tile::kChunks;
  const T* column = from + chunk * kElementsPerChunk;
  if (__ballot_sync(0xffffffffu, offset >= 0) == 0xffffffffu) {
    uint32_t to[kCopiesPerGroup];
#pragma unroll
    for (int i = 0; i < kCopiesPerGroup; ++i) {
      to[i] = tile + Tile::Offset(first_row + i * kRowsPerCopy + row, chunk);
    }
#pragma unroll
    for (int i = 0; i < Tile::kChunks; ++i) {
      const int64_t at = __shfl_sync(0xffffffffu, offset, i * kRowsPerCopy + row);
      ptx::CpAsync16(to[i % kCopiesPerGroup] + i / kCopiesPerGroup * Tile::kGroupBytes,
                     column + at);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < Tile::kChunks; ++i) {
      const int64_t at = __shfl_sync(0xffffffffu, offset, i * kRowsPerCopy + row);
      ptx::CpAsync16OrZero(tile + Tile::Offset(first_row + i * kRowsPerCopy + row, chunk),
                           column + (at < 0 ? 0 : at), at >= 0);
    }
  }
}

/*!
 * \brief Copy 32 rows of a tile, each of which one lane knows the offset of. Rows that are not
 * there (-1) are zeros: 0 x NaN of a stale row would not be.
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
__device__ __forceinline__ void CopyQueries(const AttentionParams& p, const WorkItem& item,
                                            const WarpgroupPipeline<C>& pipeline, int slot,
                                            int part, int lane) {
  constexpr int kRowsPerWarp = C::kRows / C::kQueryWarps;
  const QTile<C> q(p, item);
#pragma unroll 1
  for (int first = part * kRowsPerWarp; first < (part + 1) * kRowsPerWarp; first += kWarpSize) {
    const int row = first + lane;
    const bool exists = row < q.rows;
    const int shown = min(row, q.rows - 1);
    const int token = q.q_begin + q.Token(shown), head = q.Head(shown);
    const int64_t offset = exists ? token * p.q_token_stride + head * p.q_head_stride : int64_t{-1};
    CopyRows<typename C::QTile>(static_cast<const typename C::T*>(p.q), offset, first, lane,
                                pipeline.Q(slot));
    QueryRow known{exists ? token : -1, head, 0, 0};
    if constexpr (Variant::kHasMask || Variant::kHasLogits) {
      known.request = p.plan.q_request[token];
      known.position = p.plan.q_position[token];
    }
    pipeline.Rows(slot)[row] = known;
  }
  ptx::MbarrierArriveAfterCopies(pipeline.QueriesFull(slot));
  __syncwarp();
  if (lane == 0) ptx::MbarrierArrive(pipeline.QueriesFull(slot));
}

/*!
 * \brief One of four producer warps: a quarter of the queries, then half of every K tile (the first
 * two warps) or V tile (the others).
 */
template <typename C, typename Variant>
class RowLoader {
 public:
  using T = typename C::T;

  __device__ __forceinline__ RowLoader(const AttentionParams& p,
                                       const typename Variant::Params& variant, const NoMaps&,
                                       const WarpgroupPipeline<C>& pipeline, int warp, int lane)
      : p_(p),
        variant_(variant),
        pipeline_(pipeline),
        lookup_(p.page_size),
        warp_(warp),
        lane_(lane) {}

  __device__ __forceinline__ void Load(const ItemInfo& info,
                                       const RingCursor<C::kItemSlots>& items) {
    Rows first = Find(info, StepsDown<C, Variant>(variant_, info).step());
    ptx::WaitForEarlierLaunches();
    CopyQueries<C, Variant>(p_, info.item, pipeline_, items.slot, warp_, lane_);
    if (warp_ < C::kTileWarps) {
      LoadTiles<typename C::KTile>(
          info, first, p_.k, p_.k_strides, [&](int s) { return pipeline_.K(s); },
          [&](int s) { return pipeline_.EmptyK(s); }, [&](int s) { return pipeline_.FullK(s); });
    } else {
      LoadTiles<typename C::VTile>(
          info, first, p_.v, p_.v_strides, [&](int s) { return pipeline_.V(s); },
          [&](int s) { return pipeline_.EmptyV(s); }, [&](int s) { return pipeline_.FullV(s); });
    }
  }

 private:
  static constexpr int kRowsPerLane = C::kStepKV / C::kTileWarps / kWarpSize;
  static_assert(C::kTileWarps * 2 == C::kProducerWarps &&
                    kRowsPerLane * C::kTileWarps * kWarpSize == C::kStepKV,
                "K and V have as many warps, every lane knows the address of as many rows");

  /*! \brief Places of a lane's rows in one step. */
  struct Rows {
    TokenPlace place[kRowsPerLane];
  };

  __device__ __forceinline__ int FirstRow(int j) const {
    return (warp_ % C::kTileWarps * kRowsPerLane + j) * kWarpSize;
  }

  __device__ __forceinline__ Rows Find(const ItemInfo& info, int step) const {
    Rows rows;
#pragma unroll
    for (int j = 0; j < kRowsPerLane; ++j) {
      rows.place[j] = lookup_.Find(p_.plan.kv_indices + info.pages, info.item,
                                   step < 0 ? -1 : step * C::kStepKV + FirstRow(j) + lane_);
    }
    return rows;
  }

  template <typename Tile, typename TileAt, typename Empty, typename Full>
  __device__ __forceinline__ void LoadTiles(const ItemInfo& info, Rows rows, const void* pool,
                                            const KVStrides& strides, TileAt tile, Empty empty,
                                            Full full) {
    const T* from = static_cast<const T*>(pool) + info.item.head * strides.head;
    StepsDown<C, Variant> steps(variant_, info);
    while (steps.step() >= 0) {
      // Pages are looked up a step ahead.
      steps.Next();
      const Rows ahead = Find(info, steps.step());
      ptx::MbarrierWait(empty(stages_.slot), stages_.phase ^ 1);
#pragma unroll
      for (int j = 0; j < kRowsPerLane; ++j) {
        CopyRows<Tile>(from, rows.place[j].Offset(strides), FirstRow(j), lane_, tile(stages_.slot));
      }
      // The producers make copies visible to products: consumers would lose time with fences.
      ptx::WaitForCopies();
      ptx::FenceAsyncProxy();
      __syncwarp();
      if (lane_ == 0) ptx::MbarrierArrive(full(stages_.slot));
      stages_.Advance();
      rows = ahead;
    }
  }

  const AttentionParams& p_;
  const typename Variant::Params& variant_;
  const WarpgroupPipeline<C>& pipeline_;
  PageLookup lookup_;
  int warp_, lane_;
  RingCursor<C::kStages> stages_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KV_ROWS_CUH_
