// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Where a consumer thread stands in its block, and what its fragments are to a product.
#ifndef TVM_FLASHINFER_CUDA_BLOCK_LAYOUT_CUH_
#define TVM_FLASHINFER_CUDA_BLOCK_LAYOUT_CUH_

#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief A consumer's place in the kWarpsQ x kSlices grid of warps (tile_config.cuh). */
template <typename C>
struct BlockLayout {
  int thread;  //!< among the consumers
  int lane;
  int warp_q;  //!< row group: packed rows from 16 * warp_q on
  int slice;

  __device__ __forceinline__ BlockLayout() {
    thread = static_cast<int>(threadIdx.x);
    lane = thread % kWarpSize;
    warp_q = thread / kWarpSize % C::kWarpsQ;
    slice = thread / kWarpSize / C::kWarpsQ;
  }

  /*!
   * \brief Column of element `e` (0, 1) of an output fragment's tile. Products of narrow values
   * have even and odd columns in tiles of their own (narrow_operands.cuh).
   */
  __device__ __forceinline__ int Column(int tile, int e) const {
    if constexpr (C::kDirect) return tile / 2 * 16 + lane % 4 * 4 + e * 2 + tile % 2;
    return tile * 8 + lane % 4 * 2 + e;
  }

  /*! \brief Packed row of an accumulator fragment's half (0: upper 8 rows, 1: lower 8). */
  __device__ __forceinline__ int Row(int half) const { return warp_q * 16 + half * 8 + lane / 4; }
};

/*! \brief The first operand of a product, 16 rows of 16: two neighbouring tiles of sums, rounded.
 */
template <typename T>
__device__ __forceinline__ void PackRowOperand(uint32_t (&a)[4], const float (&left)[4],
                                               const float (&right)[4]) {
  a[0] = ptx::Pack2<T>(left[0], left[1]);
  a[1] = ptx::Pack2<T>(left[2], left[3]);
  a[2] = ptx::Pack2<T>(right[0], right[1]);
  a[3] = ptx::Pack2<T>(right[2], right[3]);
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_BLOCK_LAYOUT_CUH_
