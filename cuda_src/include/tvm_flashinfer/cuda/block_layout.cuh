// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Where a thread stands in its block, and the barrier of the warps it shares KV with.
#ifndef TVM_FLASHINFER_CUDA_BLOCK_LAYOUT_CUH_
#define TVM_FLASHINFER_CUDA_BLOCK_LAYOUT_CUH_

#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief A thread's place in the kWarpsQ x kSlices grid of warps (tile_config.cuh). */
template <typename C>
struct BlockLayout {
  int lane;
  int warp_q;  //!< row group: packed rows from FirstRow() on
  int slice;

  __device__ __forceinline__ BlockLayout() {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    lane = static_cast<int>(threadIdx.x) % kWarpSize;
    warp_q = warp % C::kWarpsQ;
    slice = warp / C::kWarpsQ;
  }

  __device__ __forceinline__ int FirstRow() const { return warp_q * 16 * C::kRowBlocks; }

  /*! \brief Packed row of an accumulator fragment's half (0: upper 8 rows, 1: lower 8). */
  __device__ __forceinline__ int Row(int block, int half) const {
    return FirstRow() + block * 16 + half * 8 + lane / 4;
  }

  /*! \brief Wait for the warps of this slice; makes their shared-memory accesses visible. */
  __device__ __forceinline__ void SyncSlice() const {
    if constexpr (C::kWarpsQ == 1) {
      __syncwarp();
    } else if constexpr (C::kSlices == 1) {
      __syncthreads();
    } else {
      ptx::NamedBarrier(1 + slice, C::kSliceThreads);
    }
  }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_BLOCK_LAYOUT_CUH_
