// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The query tile of a work item: (token, head of the GQA group) packed into rows.
#ifndef TVM_FLASHINFER_CUDA_Q_TILE_CUH_
#define TVM_FLASHINFER_CUDA_Q_TILE_CUH_

#include "block_layout.cuh"
#include "launch_params.cuh"
#include "ptx.cuh"
#include "query_row.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Elements from the first query to a row's, or -1. */
__device__ __forceinline__ int64_t QueryPlace(const LaunchParams& p, const QueryRow& row) {
  return row.token < 0 ? -1 : row.token * p.q_token_stride + row.head * p.q_head_stride;
}

/*! \brief Rows of a tile and what they stand for. */
template <typename C>
struct QTile {
  using T = typename C::T;
  using Tile = typename C::QTile;
  const Divisor& group;  //!< query heads of a KV head
  int q_begin, rows, kv_head;

  __device__ __forceinline__ QTile(const LaunchParams& p, const WorkItem& item)
      : group(p.group),
        q_begin(item.q_begin),
        rows(item.q_count * p.group.value()),
        kv_head(item.head) {}

  /*! \brief Token of a packed row, within the tile; and its query head. */
  __device__ __forceinline__ int Token(int row) const { return group.Divide(row); }
  __device__ __forceinline__ int Head(int row) const {
    return kv_head * group.value() + group.Rest(row);
  }

  /*! \brief Token and head of a packed row. */
  __device__ __forceinline__ QueryRow Row(int row) const {
    const int shown = min(row, rows - 1);
    return {row < rows ? q_begin + Token(shown) : -1, Head(shown), 0, 0};
  }

  /*!
   * \brief Copy the tile; by one warp.
   * \param place Of the lane's row (QueryPlace), which can be worked out before queries are there.
   */
  __device__ __forceinline__ void Load(const LaunchParams& p, int64_t place, int lane,
                                       uint32_t tile) const {
    constexpr int kAtOnce = C::kRows < kWarpSize ? C::kRows : kWarpSize;
    CopyRows<kAtOnce>(p, place, 0, lane, tile);
#pragma unroll 1
    for (int first = kAtOnce; first < C::kRows; first += kAtOnce) {
      LoadRows<kAtOnce>(p, first, lane, tile);
    }
  }

  /*! \brief Copy kCount rows from `first` on; by one warp. */
  template <int kCount>
  __device__ __forceinline__ void LoadRows(const LaunchParams& p, int first, int lane,
                                           uint32_t tile) const {
    CopyRows<kCount>(p, QueryPlace(p, Row(first + lane)), first, lane, tile);
  }

  /*! \brief The same by the places of the lanes' rows. Rows past the tile are zeros. */
  template <int kCount>
  __device__ __forceinline__ void CopyRows(const LaunchParams& p, int64_t place, int first,
                                           int lane, uint32_t tile) const {
    constexpr int kCopies = kCount * Tile::kChunks;
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
__device__ __forceinline__ QueryRow DescribeRow(const LaunchParams& p, const QTile<C>& q, int row) {
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
