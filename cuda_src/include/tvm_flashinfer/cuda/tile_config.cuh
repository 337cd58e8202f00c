// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// How a block of threads is laid over a query tile: the one launch heuristic of the sm_80+ kernel.
#ifndef TVM_FLASHINFER_CUDA_TILE_CONFIG_CUH_
#define TVM_FLASHINFER_CUDA_TILE_CONFIG_CUH_

#include "platform.cuh"
#include "swizzle.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Packed-row tiles the kernel is compiled for, ascending. */
constexpr int kRowTiles[] = {16, 32, 64, 128};

/*!
 * \brief Shape of the kernel for a tile of `kRows` packed rows.
 *
 * Warps form a grid of kWarpsQ x kSlices. The kSlices warps of one row group split each KV step
 * between them and merge their states at the end of the item; the kWarpsQ warps of one slice share
 * its KV in shared memory. A small tile (decode) has one warp a slice: it loads for itself and no
 * barrier stands between it and memory. A large one (prefill) has one slice: KV is read once.
 */
template <typename T_, int kHeadDimQK_, int kHeadDimVO_, int kRows_>
struct TileConfig {
  using T = T_;
  static constexpr int kHeadDimQK = kHeadDimQK_;
  static constexpr int kHeadDimVO = kHeadDimVO_;
  static constexpr int kRows = kRows_;
  static_assert(kRows == 16 || kRows == 32 || kRows == 64 || kRows == 128,
                "a query tile has 16, 32, 64 or 128 packed rows");
  static_assert(kHeadDimQK % 16 == 0 && kHeadDimVO % 16 == 0, "head dims are multiples of 16");
  static constexpr int kHeadDim = kHeadDimQK > kHeadDimVO ? kHeadDimQK : kHeadDimVO;

  // Two 16-row blocks a warp halve the shared-memory reads of a matrix product; beyond 128 columns
  // their output no longer fits into registers.
  static constexpr int kRowBlocks = kRows == 128 && kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarpsQ = kRows / (16 * kRowBlocks);
  static constexpr int kSlices = kWarpsQ >= 4 ? 1 : 4 / kWarpsQ;
  static constexpr int kWarps = kWarpsQ * kSlices;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSliceThreads = kWarpsQ * kWarpSize;
  static constexpr int kMinBlocks = kThreads <= 128 && kHeadDim <= 128 ? 2 : 1;

  /*! KV tokens of one slice in one pipeline stage. */
  static constexpr int kSliceKV = kWarpsQ == 1   ? (kHeadDim <= 64 ? 32 : 16)
                                  : kWarpsQ == 2 ? 32
                                                 : (kHeadDim <= 128 ? 64 : 32);
  static constexpr int kStepKV = kSliceKV * kSlices;

  using KTile = SwizzledTile<kHeadDimQK>;
  using VTile = SwizzledTile<kHeadDimVO>;
  static constexpr int kSliceKBytes = kSliceKV * KTile::kPitch;
  static constexpr int kSliceVBytes = kSliceKV * VTile::kPitch;
  static constexpr int kStageBytes = (kSliceKBytes + kSliceVBytes) * kSlices;

  // 16-row blocks keep their query fragments in registers, staged through the pipeline's last slot.
  static constexpr bool kQInRegisters =
      kRowBlocks == 1 && kHeadDimQK <= 128 &&
      16 * kWarpsQ * KTile::kPitch <= kSliceKBytes + kSliceVBytes;
  static constexpr int kQBytes = kQInRegisters ? 0 : kRows * KTile::kPitch;

  // As deep a pipeline as leaves room for two blocks on a multiprocessor of 227 KiB (and for one
  // of 99 KiB): latency times bandwidth is about 40 KiB a multiprocessor.
  static constexpr int kPipelineBudget = 96 * 1024;
  static constexpr int kStagesThatFit = (kPipelineBudget - kQBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 2 ? 2 : kStagesThatFit > 6 ? 6 : kStagesThatFit;
  static constexpr int kPipelineBytes = kStages * kStageBytes;

  // Slices exchange (o, max, sum) through the drained pipeline.
  static constexpr int kExchangePitch = kHeadDimVO + 4;  // floats; keeps rows off one bank
  static constexpr int kExchangeBytes =
      kSlices == 1 ? 0 : kSlices * kRows * (kExchangePitch + 2) * static_cast<int>(sizeof(float));
  // A merge stages this many states of every head of the group at a time.
  static constexpr int kMergeStates = 32;
  static constexpr int kMergeBytes = (kRows + kMergeStates * (kRows + 1)) * 4;
  static constexpr int Max(int a, int b) { return a > b ? a : b; }
  static constexpr int kQueueOffset =
      Max(kQBytes + kPipelineBytes, Max(kExchangeBytes, kMergeBytes));
  static constexpr int kSharedBytes = kQueueOffset + 16;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_TILE_CONFIG_CUH_
