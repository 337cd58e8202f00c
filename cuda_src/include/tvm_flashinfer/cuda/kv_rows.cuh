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

/*!
 * \brief Copy 32 rows of a tile, each of which one lane knows the offset of. Rows that are not
 * there
 * (-1) are zeros: 0 x NaN of a stale row would not be.
 */
template <typename Tile, typename T>
__device__ __forceinline__ void CopyRows(const T* from, int64_t offset, int first_row, int lane,
                                         uint32_t tile) {
#pragma unroll 4
  for (int i = 0; i < Tile::kChunks; ++i) {
    const int copy = i * kWarpSize + lane;
    const int row = copy / Tile::kChunks, chunk = copy % Tile::kChunks;
    const int64_t at = __shfl_sync(0xffffffffu, offset, row);
    ptx::CpAsync16OrZero(tile + Tile::Offset(first_row + row, chunk),
                         from + (at < 0 ? 0 : at) + chunk * kElementsPerChunk, at >= 0);
  }
}

/*! \brief Copy 32 rows of an item's query tile from `first_row` on. */
template <typename C>
__device__ __forceinline__ void CopyQueries(const AttentionParams& p, const WorkItem& item,
                                            int first_row, int lane, uint32_t tile) {
  const QTile<C> q(p, item);
  const int row = first_row + lane;
  int64_t offset = -1;
  if (row < q.rows) {
    offset = (q.q_begin + q.Token(row)) * p.q_token_stride + q.Head(row) * p.q_head_stride;
  }
  CopyRows<typename C::QTile>(static_cast<const typename C::T*>(p.q), offset, first_row, lane,
                              tile);
}

/*! \brief One of four producer warps, each of which gathers a quarter of every tile's rows. */
template <typename C, typename Variant>
class RowLoader {
 public:
  using T = typename C::T;
  static_assert(C::kStepKV == C::kProducerWarps * kWarpSize && C::kRows == C::kStepKV,
                "every lane knows the address of one row of each tile");

  __device__ __forceinline__ RowLoader(const AttentionParams& p,
                                       const typename Variant::Params& variant, const NoMaps&,
                                       const WarpgroupPipeline<C>& pipeline, int warp, int lane)
      : p_(p),
        variant_(variant),
        pipeline_(pipeline),
        lookup_(p.page_size),
        first_row_(warp * kWarpSize),
        lane_(lane) {}

  __device__ __forceinline__ void Load(const ItemInfo& info, int slot) {
    const WorkItem& item = info.item;
    const int32_t* pages = p_.plan.kv_indices + info.pages;
    const auto find = [&](int step) {
      return lookup_.Find(pages, item, step < 0 ? -1 : step * C::kStepKV + first_row_ + lane_);
    };
    StepsDown<C, Variant> steps(variant_, info);
    TokenPlace row = find(steps.step());
    ptx::WaitForEarlierLaunches();
    CopyQueries<C>(p_, item, first_row_, lane_, pipeline_.Q(slot));
    ptx::MbarrierArriveAfterCopies(pipeline_.QueriesFull(slot));
    const T* k = static_cast<const T*>(p_.k) + item.head * p_.k_strides.head;
    const T* v = static_cast<const T*>(p_.v) + item.head * p_.v_strides.head;
    while (steps.step() >= 0) {
      steps.Next();
      const TokenPlace ahead = find(steps.step());
      ptx::MbarrierWait(pipeline_.EmptyK(stages_.slot), stages_.phase ^ 1);
      CopyRows<typename C::KTile>(k, row.Offset(p_.k_strides), first_row_, lane_,
                                  pipeline_.K(stages_.slot));
      ptx::MbarrierArriveAfterCopies(pipeline_.FullK(stages_.slot));
      ptx::MbarrierWait(pipeline_.EmptyV(stages_.slot), stages_.phase ^ 1);
      CopyRows<typename C::VTile>(v, row.Offset(p_.v_strides), first_row_, lane_,
                                  pipeline_.V(stages_.slot));
      ptx::MbarrierArriveAfterCopies(pipeline_.FullV(stages_.slot));
      stages_.Advance();
      row = ahead;
    }
  }

 private:
  const AttentionParams& p_;
  const typename Variant::Params& variant_;
  const WarpgroupPipeline<C>& pipeline_;
  PageLookup lookup_;
  int first_row_, lane_;
  RingCursor<C::kStages> stages_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KV_ROWS_CUH_
