// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The query tile of a work item: (token, head of the GQA group) packed into rows.
#ifndef TVM_FLASHINFER_CUDA_Q_TILE_CUH_
#define TVM_FLASHINFER_CUDA_Q_TILE_CUH_

#include "../params.h"
#include "block_layout.cuh"
#include "ptx.cuh"
#include "query_row.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Elements from the first query to a row's, or -1. */
__device__ __forceinline__ int64_t QueryPlace(const AttentionParams& p, const QueryRow& row) {
  return row.token < 0 ? -1 : row.token * p.q_token_stride + row.head * p.q_head_stride;
}

/*! \brief Rows of a tile and what they stand for. */
template <typename C>
struct QTile {
  using T = typename C::T;
  using Tile = typename C::QTile;
  int q_begin, rows, group, kv_head;

  __device__ __forceinline__ QTile(const AttentionParams& p, const WorkItem& item)
      : q_begin(item.q_begin), group(p.num_qo_heads / p.num_kv_heads), kv_head(item.head) {
    rows = item.q_count * group;
  }

  __device__ __forceinline__ int Token(int row) const { return row / group; }  //!< within the tile
  __device__ __forceinline__ int Head(int row) const { return kv_head * group + row % group; }

  /*! \brief Token and head of a packed row. */
  __device__ __forceinline__ QueryRow Row(int row) const {
    const int shown = min(row, rows - 1);
    return {row < rows ? q_begin + Token(shown) : -1, Head(shown), 0, 0};
  }

  /*! \brief Copy the tile; by one warp. */
  __device__ __forceinline__ void Load(const AttentionParams& p, int lane, uint32_t tile) const {
    constexpr int kAtOnce = C::kRows < kWarpSize ? C::kRows : kWarpSize;
#pragma unroll 1
    for (int first = 0; first < C::kRows; first += kAtOnce) {
      LoadRows<kAtOnce>(p, first, lane, tile);
    }
  }

  /*!
   * \brief Copy kCount rows from `first` on; by one warp, whose lanes each work out a row's place.
   * Rows past the tile are zeros.
   */
  template <int kCount>
  __device__ __forceinline__ void LoadRows(const AttentionParams& p, int first, int lane,
                                           uint32_t tile) const {
    constexpr int kCopies = kCount * Tile::kChunks;
    const int64_t place = QueryPlace(p, Row(first + lane));
#pragma unroll 4
    for (int i = 0; i < CeilDiv(kCopies, kWarpSize); ++i) {
      const int copy = i * kWarpSize + lane;
      const int row = copy / Tile::kChunks, chunk = copy % Tile::kChunks;
      const int64_t from = __shfl_sync(0xffffffffu, place, row % kWarpSize);
      if (kCopies % kWarpSize != 0 && copy >= kCopies) continue;
      const uint32_t to = tile + Tile::Offset(first + row, chunk);
      if (from >= 0) {
        ptx::CpAsync16(to, static_cast<const T*>(p.q) + from + chunk * kElementsPerChunk);
      } else {
        ptx::StoreSharedZero16(to);
      }
    }
  }

  /*! \brief Fragment of a warp's 16 rows x 16 columns, as the A operand of a matrix product. */
  __device__ __forceinline__ static void Fragment(uint32_t (&a)[4], const BlockLayout<C>& at,
                                                  uint32_t tile, int k) {
    const int row = at.warp_q * 16 + at.lane % 16;
    ptx::LdMatrixX4(a, tile + Tile::Offset(row, k * 2 + at.lane / 16));
  }
};

/*! \brief What a packed row stands for, as far as the variant asks. */
template <typename Variant, typename C>
__device__ __forceinline__ QueryRow DescribeRow(const AttentionParams& p, const QTile<C>& q,
                                                int row) {
  QueryRow known = q.Row(row);
  if constexpr (Variant::kHasMask || Variant::kHasLogits) {
    const int token = q.q_begin + q.Token(min(row, q.rows - 1));
    known.request = p.plan.q_request[token];
    known.position = p.plan.q_position[token];
  }
  return known;
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_Q_TILE_CUH_
