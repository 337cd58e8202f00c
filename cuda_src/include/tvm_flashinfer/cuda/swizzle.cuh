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
 * \brief A tile of `kRows` rows of `kCols` 16-bit elements, in 16-byte chunks.
 *
 * The tile is cut into panels of 64 columns; a panel's rows are 128 bytes, and chunk c of row r
 * lies at c ^ (r % 8) of its row. The eight rows that ldmatrix reads at one column, and the eight
 * chunks that cp.async writes to one row, fall into eight different bank groups. It is also the
 * layout that wgmma and TMA call a 128-byte swizzle.
 */
template <int kCols, int kRows>
struct SwizzledTile {
  static constexpr int kChunks = kCols / kElementsPerChunk;
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kBytes = (kCols + 63) / 64 * kPanelBytes;

  /*! \brief Byte offset of a chunk. */
  __device__ __forceinline__ static uint32_t Offset(int row, int chunk) {
    return static_cast<uint32_t>(chunk / 8 * kPanelBytes + row * 128 +
                                 ((chunk % 8 ^ (row & 7)) << 4));
  }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_SWIZZLE_CUH_
