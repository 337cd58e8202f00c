// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// How a block of threads is laid over a query tile: the one launch heuristic of the sm_80+ kernel.
#ifndef TVM_FLASHINFER_CUDA_TILE_CONFIG_CUH_
#define TVM_FLASHINFER_CUDA_TILE_CONFIG_CUH_

#include <type_traits>

#include "../plan.h"
#include "operand_form.cuh"
#include "platform.cuh"
#include "swizzle.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief Shape of the kernel for a tile of `kRows` packed rows.
 *
 * Producer warps fill a ring of stages, half of them with K and half with V; they run ahead of the
 * consumers, across work items. Consumer warps form a grid of kWarpsQ x kSlices, 16 rows each: the
 * kSlices warps of one row group split each stage between them and merge their states at the end
 * of the item. A small tile (decode) has one row group, a large one (prefill) one slice.
 *
 * Heads above 256 are wide: their outputs don't fit a warp's registers, so the warps of a row group
 * share a stage's tokens for logits, and split the columns of its output (wide_heads.cuh).
 *
 * \tparam Form_ See operand_form.cuh.
 */
template <typename T_, int kHeadDimQK_, int kHeadDimVO_, int kRows_,
          typename Form_ = OperandForm<T_>>
struct TileConfig {
  using T = T_;
  using Form = Form_;
  static constexpr int kHeadDimQK = kHeadDimQK_;
  static constexpr int kHeadDimVO = kHeadDimVO_;
  static constexpr int kRows = kRows_;
  static_assert(kRows == 16 || kRows == 32 || kRows == 64 || kRows == 128,
                "a query tile has 16, 32, 64 or 128 packed rows");
  static_assert(kHeadDimQK % 16 == 0 && kHeadDimVO % 16 == 0, "head dims are multiples of 16");
  static constexpr int kHeadDim = kHeadDimQK > kHeadDimVO ? kHeadDimQK : kHeadDimVO;

  static constexpr bool kWide = kHeadDim > 256;
  static_assert(!kWide || (kRows != 32 && kRows != 128 && kHeadDimVO % 64 == 0),
                "wide heads have tiles of 16 and 64 rows, and values of multiples of 64");
  static_assert(!Form::kSharedKV || (kWide && kHeadDimVO <= kHeadDimQK && !Form::kConvertV),
                "values that start their keys are read from them as they are");

  static constexpr int kWarpsQ = kRows / 16;
  static constexpr int kSlices = kWide ? 4 : kWarpsQ >= 4 ? 1 : 4 / kWarpsQ;
  static constexpr int kConsumerWarps = kWarpsQ * kSlices;
  static constexpr int kConsumerThreads = kConsumerWarps * kWarpSize;
  // Two blocks a multiprocessor hide each other's ends of items.
  static constexpr int kMinBlocks = kRows <= 64 && kHeadDim <= 128 ? 2 : 1;

  /*! KV tokens of a stage: 64, and more of small heads, fewer where registers are short. */
  static constexpr int kStepKV = kWide && !Form::kSharedKV        ? 32
                                 : kSlices == 4 && kHeadDim <= 64 ? 128
                                 : kSlices == 1 && kHeadDim > 128 ? 32
                                                                  : 64;
  static constexpr int kSliceKV = kWide ? 16 : kStepKV / kSlices;
  static constexpr bool kQInRegisters = kHeadDimQK <= 128;

  //! Products read 8-bit floats where they lie (narrow_operands.cuh): each warp has tokens of its
  //! own.
  static constexpr bool kDirect = Form::kWidened && !kWide && kWarpsQ == 1 && kQInRegisters &&
                                  kHeadDimQK % 32 == 0 && kHeadDimVO % 32 == 0;

  //! Operands of products. 8-bit floats are widened to half precision, which holds them exactly, in
  //! one instruction for two, to bfloat16 in four; weights of a softmax are at most 2^8.
  using Product = std::conditional_t<kDirect && Form::kSoftmax, Float16, T>;

  //! Keys are transformed as fragments (key_fragments.cuh): each warp has tokens of its own, and
  //! what an element is combined with is in the same lane.
  static constexpr bool kKeysInRegisters =
      Form::kKeyPartner >= 0 && Form::kKeyPaired <= kHeadDimQK &&
      (Form::kKeyPartner <= 1 || Form::kKeyPartner == 8 || Form::kKeyPartner % 16 == 0) && !kWide &&
      kWarpsQ == 1 && kQInRegisters;
  //! Rows are converted in shared memory (convert.cuh).
  static constexpr bool kConvertK = Form::kConvertK && !kDirect && !kKeysInRegisters;
  static constexpr bool kConvertV = Form::kConvertV && !kDirect;

  static constexpr int kLoaders = kRows == 128 ? 2 : 1;  //!< warps that load K, and as many V
  static constexpr int kProducerWarps = 2 * kLoaders;
  static constexpr int kThreads = kConsumerThreads + kProducerWarps * kWarpSize;

  using QTile = SwizzledTile<kHeadDimQK, kRows>;
  using KTile = SwizzledTile<kHeadDimQK, kStepKV>;
  using VTile = SwizzledTile<kHeadDimVO, kStepKV>;
  // What lies in the ring: the operands themselves, or rows that are converted to them.
  using Pool = typename Form::Pool;
  template <int kDim, bool kConvert>
  using Ring = std::conditional_t<
      kDirect, SwizzledTile<kDim / 2, kStepKV>,
      std::conditional_t<kConvert, RawTile<Pool, kDim, kStepKV>, SwizzledTile<kDim, kStepKV>>>;
  using KRing = Ring<kHeadDimQK, kConvertK>;
  using VRing = Ring<kHeadDimVO, kConvertV>;
  static constexpr int kKBytes = KRing::kBytes;
  static constexpr int kStageBytes = kKBytes + (Form::kSharedKV ? 0 : VRing::kBytes);
  static constexpr int kOperandKBytes = kConvertK ? KTile::kBytes : 0;
  static constexpr int kOperandBytes = kOperandKBytes + (kConvertV ? VTile::kBytes : 0);
  static constexpr int kQBytes = QTile::kBytes;

  static constexpr int kItemSlots = kWide && kRows > 16 ? 1 : 2;

  // States of the slices are exchanged a few rows at a time.
  static constexpr int kExchangeRows = kSlices == 1 ? 16 : kWide ? 1 : 4;
  static constexpr int kExchangePitch = kHeadDimVO + 4;  // floats; keeps rows off one bank
  static constexpr int kExchangeBytes =
      kSlices == 1 && !Form::kRowOutputs ? 0 : kSlices * kExchangeRows * (kExchangePitch + 2) * 4;
  // Wide heads: weights of a stage, and maxima or sums of each row and slice.
  using WeightTile = SwizzledTile<kStepKV, kRows>;
  static constexpr int kWeightBytes = kWide ? WeightTile::kBytes + kRows * kSlices * 4 : 0;
  static constexpr int kMergeBytes = kRows * 8;
  static constexpr int Max(int a, int b) { return a > b ? a : b; }

  // Decode keeps 128 KiB a multiprocessor in flight: latency times bandwidth is about 40 KiB, the
  // rest covers consumers that are busy with the end of an item. More is slower (an H200 loses 2 %
  // with 192 KiB): copies then queue in the L2 cache. Prefill takes what fits.
  static constexpr int kScratchBytes = Max(Max(kExchangeBytes, kMergeBytes), kWeightBytes);
  static constexpr int kFixedBytes =
      kItemSlots * (kQBytes + 64) + kScratchBytes + kOperandBytes + 256;
  static constexpr int kRoom = (kMinBlocks == 2 ? 113 : 227) * 1024 - kFixedBytes;
  static constexpr int kRingBudget = kWide ? kRoom
                                     : kSlices > 1
                                         ? (kMinBlocks == 2 ? 64 : 128) * 1024
                                         : (kMinBlocks == 2 ? 113 : 226) * 1024 - kFixedBytes;
  static constexpr int kStagesThatFit = kRingBudget / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 2 ? 2 : kStagesThatFit > 6 ? 6 : kStagesThatFit;

  // Shared memory: ring, converted operands, query tiles, scratch, item records, barriers.
  static constexpr int kOperandOffset = kStages * kStageBytes;
  static constexpr int kQOffset = kOperandOffset + kOperandBytes;
  static constexpr int kScratchOffset = kQOffset + kItemSlots * kQBytes;
  static constexpr int kInfoOffset = kScratchOffset + kScratchBytes;
  static constexpr int kBarrierOffset = kInfoOffset + kItemSlots * 64;
  static constexpr int kSharedBytes = kBarrierOffset + 8 * (3 * kStages + 3 * kItemSlots);
  static_assert(kSharedBytes <= 227 * 1024, "a block has at most 227 KiB of shared memory");
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_TILE_CONFIG_CUH_
