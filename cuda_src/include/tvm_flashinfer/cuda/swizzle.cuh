// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Rows of 16-bit elements in shared memory, free of bank conflicts.
#ifndef TVM_FLASHINFER_CUDA_SWIZZLE_CUH_
#define TVM_FLASHINFER_CUDA_SWIZZLE_CUH_

#include "element.cuh"
#include "platform.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief A tile of rows of `kCols` 16-bit elements, in 16-byte chunks.
 *
 * Chunk c of row r lies at c ^ (r % 8): the eight rows that ldmatrix reads at one column, and the
 * eight chunks that cp.async writes to one row, fall into eight different bank groups. Rows are
 * padded to 64 elements, so that the exclusive or stays within a row.
 */
template <int kCols>
struct SwizzledTile {
  static constexpr int kChunks = kCols / kElementsPerChunk;
  static constexpr int kPitch = (kCols + 63) / 64 * 128;  //!< bytes from row to row

  /*! \brief Byte offset of a chunk. */
  __device__ __forceinline__ static uint32_t Offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kPitch + ((chunk ^ (row & 7)) << 4));
  }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_SWIZZLE_CUH_
