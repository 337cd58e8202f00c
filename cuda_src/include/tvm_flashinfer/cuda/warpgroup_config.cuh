// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// How a block of threads is laid over a query tile where warpgroups multiply (sm_90a).
#ifndef TVM_FLASHINFER_CUDA_WARPGROUP_CONFIG_CUH_
#define TVM_FLASHINFER_CUDA_WARPGROUP_CONFIG_CUH_

#include <type_traits>

#include "kv_maps.cuh"
#include "platform.cuh"
#include "query_row.cuh"
#include "stage_record.cuh"
#include "wgmma_tile.cuh"

namespace tvm_flashinfer {
namespace cuda {

constexpr int kWarpgroupSize = 128;

/*!
 * \brief Whether the kernel of warpgroups serves a query tile. Its operands go from global to
 * shared memory to the tensor cores, untouched: what transforms them is left to AttentionKernel.
 */
template <typename Variant>
constexpr bool FitsWarpgroups(int head_dim_qk, int head_dim_vo, int rows) {
  return rows == 128 && (head_dim_qk == 64 || head_dim_qk == 128) &&
         (head_dim_vo == 64 || head_dim_vo == 128) && !Variant::kHasQuery && !Variant::kHasKey &&
         !Variant::kHasValue && !Variant::kHasOutput && Variant::kSoftmax;
}

/*!
 * \brief Whether warpgroups serve heads whose values start their keys (latent attention): any tile
 * of at most 64 rows, one warpgroup to each half of the values.
 */
template <typename Variant>
constexpr bool FitsLatent(int head_dim_qk, int head_dim_vo) {
  return head_dim_vo == 512 && head_dim_qk >= 512 && head_dim_qk <= 576 && head_dim_qk % 64 == 0 &&
         !Variant::kHasQuery && !Variant::kHasKey && !Variant::kHasValue && !Variant::kHasOutput &&
         Variant::kSoftmax;
}

/*!
 * \brief Shape of the kernel for a tile of `kRows` packed rows.
 *
 * Every 64 rows have a warpgroup of consumers. One warpgroup of producers fills a ring of K and a
 * ring of V tiles and runs ahead across work items, whose queries have two slots.
 * \tparam kBoxes Pages are copied eight tokens at a time by the tensor memory accelerator; else
 * rows are gathered, which serves any page size and takes registers and issue slots from consumers.
 */
template <typename T_, int kHeadDimQK_, int kHeadDimVO_, int kRows_, bool kBoxes_>
struct WarpgroupConfig {
  using T = T_;
  static constexpr int kHeadDimQK = kHeadDimQK_;
  static constexpr int kHeadDimVO = kHeadDimVO_;
  static constexpr int kRows = kRows_;

  static constexpr bool kBoxes = kBoxes_;
  static constexpr bool kSharedKV = false;
  using Maps = std::conditional_t<kBoxes, KVMaps, NoMaps>;
  static constexpr int kParts = 1;  //!< of a K tile, its panels in turn, with a barrier each
  static constexpr bool kStageRecords = false;

  static constexpr int kConsumerGroups = kRows / 64;
  static constexpr int kConsumerThreads = kConsumerGroups * kWarpgroupSize;
  static constexpr int kConsumerWarps = kConsumerThreads / kWarpSize;
  static constexpr int kProducerWarps = kWarpgroupSize / kWarpSize;
  // The producer warp that takes items. Of boxes one that copies queries: a slot ahead, it never
  // waits for the ring.
  static constexpr int kLeadWarp = kBoxes ? 3 : 0;
  static constexpr int kQueryWarps = kBoxes ? 2 : kProducerWarps;  //!< that copy queries, the last
  //! Arrivals that fill a tile: every lane's once its copies have ended, or one that expects bytes.
  static constexpr int kTileArrivals = kBoxes ? 1 : kProducerWarps * kWarpSize;
  static constexpr int kThreads = kConsumerThreads + kWarpgroupSize;
  // Together what the launch gave: 384 threads x 168. Gathering keeps a batch of addresses.
  static constexpr int kConsumerRegisters = kBoxes ? 216 : 208;
  static constexpr int kProducerRegisters = kBoxes ? 72 : 88;

  // Consumers as a grid of kWarpsQ x kSlices warps (block_layout.cuh, mask.cuh).
  static constexpr int kWarpsQ = kConsumerWarps;
  static constexpr int kSlices = 1;

  static constexpr int kStepKV = 128;  //!< KV tokens of a stage
  static constexpr int kSliceKV = kStepKV;
  static constexpr int kStages = 2;
  static constexpr int kItemSlots = 2;

  using QTile = WgmmaTile<kHeadDimQK, kRows>;
  using KTile = WgmmaTile<kHeadDimQK, kStepKV>;
  using VTile = WgmmaTile<kHeadDimVO, kStepKV>;

  static constexpr int kMergeBytes = kRows * 8;

  // Shared memory: rings, query tiles, merge, item records, rows of the tiles, barriers.
  static constexpr int kVOffset = kStages * KTile::kBytes;
  static constexpr int kQOffset = kVOffset + kStages * VTile::kBytes;
  static constexpr int kScratchOffset = kQOffset + kItemSlots * QTile::kBytes;
  static constexpr int kInfoOffset = kScratchOffset + kMergeBytes;
  static constexpr int kRowsOffset = kInfoOffset + kItemSlots * 64;
  static constexpr int kRowsBytes = kRows * sizeof(QueryRow);
  static constexpr int kBarrierOffset = kRowsOffset + kItemSlots * kRowsBytes;
  static constexpr int kSharedBytes =
      kBarrierOffset + 8 * ((3 + kParts) * kStages + 3 * kItemSlots);
};

/*!
 * \brief Shape of the kernel of latent attention: 64 packed rows, of which a step's queries may
 * fill fewer, and values that are the first columns of their keys.
 *
 * A row's output does not fit a warpgroup's registers: each sums one half of the values, and they
 * make logits and weights of steps in turn. Of three stages one or two are on their way while
 * others are multiplied, and the longer a step, the less often the queries are read for its logits:
 * so that three of 48 tokens fit, consumers keep the last dims of the queries in registers.
 */
template <typename T_, int kHeadDimQK_, int kHeadDimVO_>
struct LatentConfig {
  using T = T_;
  static constexpr int kHeadDimQK = kHeadDimQK_;
  static constexpr int kHeadDimVO = kHeadDimVO_;
  static constexpr int kRows = 64;
  static constexpr int kColumns = kHeadDimVO / 2;  //!< of the output, of one warpgroup

  static constexpr bool kBoxes = true;
  static constexpr bool kSharedKV = true;
  using Maps = KVMaps;
  static constexpr bool kStageRecords = true;
  //! Of a K tile, its panels in turn: products begin when the first is there.
  static constexpr int kParts = kHeadDimQK / 64 % 3 == 0 ? 3 : 2;
  static_assert(kHeadDimQK / 64 % kParts == 0, "parts have as many panels");

  static constexpr int kConsumerThreads = 2 * kWarpgroupSize;
  static constexpr int kConsumerWarps = kConsumerThreads / kWarpSize;
  static constexpr int kProducerWarps = kWarpgroupSize / kWarpSize;
  static constexpr int kLeadWarp = 3;
  static constexpr int kQueryWarps = 0;    //!< there is room for one item's: consumers copy them
  static constexpr int kTileArrivals = 2;  //!< of warps that take boxes in turn
  static constexpr int kThreads = kConsumerThreads + kWarpgroupSize;
  static constexpr int kConsumerRegisters = 224;
  static constexpr int kProducerRegisters = 56;

  // Consumers as a grid of kWarpsQ x kSlices warps: those of the second slice have the same rows.
  static constexpr int kWarpsQ = 4;
  static constexpr int kSlices = 2;

  static constexpr int kStepKV = 48;
  static constexpr int kSliceKV = kStepKV;
  static constexpr int kStages = 3;
  static constexpr int kItemSlots = 2;
  static constexpr int kRegisterDims = 128;  //!< of the queries, the last ones: in registers

  //! Named barrier: consumers have asked for the first queries, warps that load keys may begin.
  static constexpr int kQueriesAsked = 4;
  static constexpr int kQueriesAskedThreads = kConsumerThreads + kTileArrivals * kWarpSize;

  using QTile = WgmmaTile<kHeadDimQK - kRegisterDims, kRows>;
  using KTile = WgmmaTile<kHeadDimQK, kStepKV>;
  using VTile = KTile;
  using WeightsTile = WgmmaFragments;

  // Shared memory: ring, queries, merge, weights and maxima of a step, sums, records, barriers.
  static constexpr int kVOffset = 0;
  static constexpr int kQOffset = kStages * KTile::kBytes;
  static constexpr int kScratchOffset = kQOffset + QTile::kBytes;
  static constexpr int kMergeBytes = kRows * 8;
  static constexpr int kWeightsOffset = kScratchOffset + kMergeBytes;
  static constexpr int kMaximaOffset = kWeightsOffset + kRows * kStepKV * 2;
  static constexpr int kSumsOffset = kMaximaOffset + kRows * 4;
  static constexpr int kInfoOffset = kSumsOffset + 2 * kRows * 4;
  static constexpr int kBarrierOffset = kInfoOffset + kItemSlots * 64;
  static constexpr int kStagesOffset =
      kBarrierOffset + 8 * ((3 + kParts) * kStages + 3 * kItemSlots);
  static constexpr int kSharedBytes =
      kStagesOffset + kStages * static_cast<int>(sizeof(StageRecord));
  static_assert(kSharedBytes <= 227 * 1024, "a block has at most 227 KiB of shared memory");
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WARPGROUP_CONFIG_CUH_
