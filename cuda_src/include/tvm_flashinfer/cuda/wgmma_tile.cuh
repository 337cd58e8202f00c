// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Tiles in shared memory as operands of a warpgroup's products.
#ifndef TVM_FLASHINFER_CUDA_WGMMA_TILE_CUH_
#define TVM_FLASHINFER_CUDA_WGMMA_TILE_CUH_

#include "element.cuh"
#include "platform.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief Matrix descriptor of an operand (PTX ISA, "Asynchronous warpgroup level matrix
 * instructions"), `offset` bytes into a tile.
 *
 * Addresses of shared memory have 18 bits, so no sum carries into another field, and operands of
 * one tile differ by one addition: made from scratch, a descriptor takes as long as a small
 * product.
 * \param panel_bytes From one panel of 64 elements to the next, where those run along the operand's
 * outer (m or n) dimension; unused where they run along k.
 * \param group_bytes From eight rows of a panel to the next eight.
 * \tparam kSwizzled Under a 128-byte swizzle; else panels have 8 elements, which k runs along too.
 */
template <bool kSwizzled = true>
__device__ __forceinline__ uint64_t WgmmaDescriptor(uint32_t tile, int offset, int panel_bytes,
                                                    int group_bytes) {
  const uint32_t low =
      ((tile & 0x3ffff) >> 4) + static_cast<uint32_t>((offset >> 4) + (panel_bytes >> 4 << 16));
  const uint32_t high = static_cast<uint32_t>(group_bytes >> 4) | (kSwizzled ? 1u << 30 : 0u);
  return uint64_t{high} << 32 | low;
}

/*!
 * \brief A tile of `kRows` rows of `kCols` 16-bit elements, in 16-byte chunks.
 *
 * Eight rows x 64 columns are 1024 bytes, in which chunk c of row r lies at c ^ (r % 8) of the
 * row's 128 bytes. These lie along the columns first, so eight rows are one stretch of memory, and
 * so are the tokens of a page.
 */
template <int kCols, int kRows>
struct WgmmaTile {
  static_assert(kCols % 64 == 0 && kRows % 8 == 0, "a tile consists of 8 x 64 elements");
  static constexpr int kChunks = kCols / kElementsPerChunk;
  static constexpr int kPanelBytes = 1024;
  static constexpr int kGroupBytes = kCols / 64 * kPanelBytes;
  static constexpr int kBytes = kRows / 8 * kGroupBytes;

  /*! \brief Byte offset of a chunk. */
  __device__ __forceinline__ static uint32_t Offset(int row, int chunk) {
    return static_cast<uint32_t>(row / 8 * kGroupBytes + chunk / 8 * kPanelBytes + row % 8 * 128 +
                                 ((chunk % 8 ^ row % 8) << 4));
  }
  /*! \brief Rows from `first_row` on, columns [16 k, 16 k + 16): the columns are summed over. */
  __device__ __forceinline__ static uint64_t Columns(uint32_t tile, int first_row, int k) {
    return WgmmaDescriptor(tile + first_row / 8 * kGroupBytes, k / 4 * kPanelBytes + k % 4 * 32, 0,
                           kGroupBytes);
  }
  /*! \brief Rows [16 k, 16 k + 16), columns from `first_column` on: the rows are summed over. */
  __device__ __forceinline__ static uint64_t Rows(uint32_t tile, int k, int first_column = 0) {
    return WgmmaDescriptor(tile, 2 * k * kGroupBytes + first_column / 64 * kPanelBytes, kPanelBytes,
                           kGroupBytes);
  }
};

/*!
 * \brief A tile of 64 rows of 16-bit elements without a swizzle: 8 x 8 elements are 128 bytes, row
 * by row, just as the lanes of a warp hold them in fragments.
 */
struct WgmmaFragments {
  static constexpr int kMatrixBytes = 128;
  static constexpr int kColumnBytes = 8 * kMatrixBytes;

  /*! \brief Byte offset of the matrix of rows from 8 i and columns from 8 j on. */
  __device__ __forceinline__ static uint32_t Offset(int i, int j) {
    return static_cast<uint32_t>(j * kColumnBytes + i * kMatrixBytes);
  }
  /*! \brief Columns [16 k, 16 k + 16), which are summed over, as the first operand. */
  __device__ __forceinline__ static uint64_t Columns(uint32_t tile, int k) {
    return WgmmaDescriptor<false>(tile, 2 * k * kColumnBytes, kColumnBytes, kMatrixBytes);
  }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WGMMA_TILE_CUH_
