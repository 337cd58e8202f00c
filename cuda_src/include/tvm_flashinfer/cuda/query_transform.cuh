// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// A variant's transform of queries: once an item, in shared memory.
#ifndef TVM_FLASHINFER_CUDA_QUERY_TRANSFORM_CUH_
#define TVM_FLASHINFER_CUDA_QUERY_TRANSFORM_CUH_

#include "../variant.h"
#include "block_layout.cuh"
#include "lanes.cuh"
#include "launch_params.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"
#include "q_tile.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief A row of a swizzled tile: index -> element as float32. */
template <typename T, typename Tile>
struct SwizzledRow {
  const uint8_t* tile;
  int row;

  __device__ __forceinline__ float operator()(int i) const {
    const uint8_t* chunk = tile + Tile::Offset(row, i / kElementsPerChunk);
    return ptx::ToFloat(reinterpret_cast<const T*>(chunk)[i % kElementsPerChunk]);
  }
};

/*!
 * \brief Replace the queries of an item's tile by what the variant makes of them.
 *
 * All consumers call it when the tile is full, before anyone reads it. A warp computes a whole row
 * before it writes one: a transform may read any element.
 * \param tile Of Pipeline::Q.
 */
template <typename C, typename Variant>
__device__ __forceinline__ void TransformQueries(const LaunchParams& p,
                                                 const typename Variant::Params& variant,
                                                 const QTile<C>& q, const Pipeline<C>& pipeline,
                                                 uint32_t tile) {
  if constexpr (Variant::kHasQuery) {
    using T = typename C::T;
    using Row = SwizzledRow<T, typename C::QTile>;
    using Lanes = VectorLanes<Row>;
    constexpr int kPairs = C::kHeadDimQK / 2, kPairsPerLane = CeilDiv(kPairs, kWarpSize);
    uint8_t* smem = pipeline.smem + (tile - pipeline.base);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll 1
    for (int row = warp; row < q.rows; row += C::kConsumerWarps) {
      const int token = q.q_begin + q.Token(row);
      VectorIndex<Lanes> at{
          p.plan.q_request[token], p.plan.q_position[token], q.Head(row), q.kv_head, token, 0};
      uint32_t packed[kPairsPerLane];
#pragma unroll
      for (int j = 0; j < kPairsPerLane; ++j) {
        const int pair = j * kWarpSize + lane;
        float x[2] = {0.0f, 0.0f};
        if (pair < kPairs) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            at.dim = 2 * pair + e;
            x[e] = Variant::template Query<Lanes>(
                variant, typename Lanes::Vector{Row{smem, row}, C::kHeadDimQK - 1, at.dim}, at);
          }
        }
        packed[j] = ptx::Pack2<T>(x[0], x[1]);
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kPairsPerLane; ++j) {
        const int pair = j * kWarpSize + lane;
        if (pair < kPairs) {
          *reinterpret_cast<uint32_t*>(smem + C::QTile::Offset(row, pair / 4) + pair % 4 * 4) =
              packed[j];
        }
      }
    }
    Pipeline<C>::SyncConsumers();
  }
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_QUERY_TRANSFORM_CUH_
