// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Gathers block-sparse KV rows into shared memory: page table -> cp.async, any page size.
#ifndef TVM_FLASHINFER_CUDA_KV_GATHER_CUH_
#define TVM_FLASHINFER_CUDA_KV_GATHER_CUH_

#include "launch_params.cuh"
#include "pipeline.cuh"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief One operand (K or V) of one work item, as one warp loads it: of every kStepKV rows, the
 * `part`-th of kLoaders equal parts.
 */
template <typename C, typename Tile>
class KVGather {
 public:
  using Pool = typename C::Pool;
  static constexpr int kUnitsPerChunk = 16 / sizeof(Pool);
  static constexpr int kRowsPerLane = C::kStepKV / kWarpSize / C::kLoaders;
  static_assert(C::kStepKV % (kWarpSize * C::kLoaders) == 0,
                "every lane knows the address of as many rows");

  /*!
   * \brief Pages of this lane's rows, lane + 32 j of the part, and tokens within them; page -1: no
   * such token. As loaded: no arithmetic may touch a page id before its step, or the lookup would
   * be waited for.
   */
  struct Rows {
    int32_t page[kRowsPerLane];
    uint32_t entry[kRowsPerLane];
  };

  __device__ __forceinline__ KVGather(const LaunchParams& p, const void* pool,
                                      const KVStrides& strides, const ItemInfo& info, int lane,
                                      int part)
      : pages_(p.plan.kv_indices + info.pages),
        pool_(static_cast<const Pool*>(pool) + info.item.head * strides.head),
        page_stride_(strides.page),
        token_stride_(strides.token),
        page_size_(p.page),
        kv_begin_(info.item.kv_begin),
        kv_count_(info.item.kv_count),
        lane_(lane),
        first_row_(part * kRowsPerLane * kWarpSize) {}

  /*! \brief Look up the pages of a step; a step ahead of its copies, so that nothing waits. */
  __device__ __forceinline__ Rows Resolve(int step) const {
    Rows rows;
#pragma unroll
    for (int j = 0; j < kRowsPerLane; ++j) {
      const int token = step * C::kStepKV + first_row_ + j * kWarpSize + lane_;
      rows.page[j] = -1;
      rows.entry[j] = 0;
      if (token < kv_count_) {
        const int at = kv_begin_ + token;
        const int page = page_size_.Divide(at);
        rows.entry[j] = static_cast<uint32_t>(at - page * page_size_.value());
        rows.page[j] = pages_[page];
      }
    }
    return rows;
  }

  /*! \brief Have the rows of a step brought to the L2 cache. */
  __device__ __forceinline__ void Prefetch(const Rows& rows) const {
    constexpr int kLine = 128 / sizeof(Pool);
#pragma unroll
    for (int j = 0; j < kRowsPerLane; ++j) {
      if (rows.page[j] < 0) continue;
      const Pool* row = pool_ + rows.page[j] * page_stride_ + rows.entry[j] * token_stride_;
#pragma unroll
      for (int unit = 0; unit < Tile::kChunks * kUnitsPerChunk; unit += kLine) {
        ptx::PrefetchL2(row + unit);
      }
    }
  }

  /*! \brief Where in the pool the rows of a step lie, in elements; -1: no such token. */
  struct Places {
    int64_t row[kRowsPerLane];
    int64_t first[kRowsPerLane];    //!< of the sixteen rows that this one belongs to
    unsigned follow[kRowsPerLane];  //!< by lane, whether the row follows those before in memory
  };
  __device__ __forceinline__ Places Locate(const Rows& rows) const {
    Places places;
#pragma unroll
    for (int j = 0; j < kRowsPerLane; ++j) {
      const int64_t offset =
          rows.page[j] < 0 ? -1 : rows.page[j] * page_stride_ + rows.entry[j] * token_stride_;
      const int64_t first = __shfl_sync(0xffffffffu, offset, lane_ & 16);
      const bool follows = first >= 0 && offset == first + (lane_ & 15) * token_stride_;
      places.row[j] = offset;
      places.first[j] = first;
      places.follow[j] = __ballot_sync(0xffffffffu, follows);
    }
    return places;
  }

  /*! \brief Issue the copies of a step. */
  __device__ __forceinline__ void Load(const Places& places, uint32_t tile) const {
#pragma unroll
    for (int j = 0; j < kRowsPerLane; ++j) {
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const int row = first_row_ + j * kWarpSize + half * kGroup;
        // Sixteen rows that follow each other in memory, in one page as a rule, need one address.
        if ((places.follow[j] >> (half * kGroup) & 0xffffu) == 0xffffu) {
          LoadRun(__shfl_sync(0xffffffffu, places.first[j], half * kGroup), row, tile);
        } else {
          LoadScattered(places.row[j], half * kGroup, row, tile);
        }
      }
    }
  }

 private:
  static constexpr int kGroup = 16;
  static constexpr int kCopies = kGroup * Tile::kChunks;
  static constexpr bool kWhole = kCopies % kWarpSize == 0;

  __device__ __forceinline__ void LoadRun(int64_t offset, int first_row, uint32_t tile) const {
    const Pool* from = pool_ + offset;
    const int token_stride = static_cast<int>(token_stride_);
#pragma unroll
    for (int i = 0; i < CeilDiv(kCopies, kWarpSize); ++i) {
      const int copy = i * kWarpSize + lane_;
      const int row = copy / Tile::kChunks, chunk = copy % Tile::kChunks;
      if (kWhole || copy < kCopies) {
        ptx::CpAsync16(tile + Tile::Offset(first_row + row, chunk),
                       from + row * token_stride + chunk * kUnitsPerChunk);
      }
    }
  }

  __device__ __forceinline__ void LoadScattered(int64_t offset, int first_lane, int first_row,
                                                uint32_t tile) const {
#pragma unroll
    for (int i = 0; i < CeilDiv(kCopies, kWarpSize); ++i) {
      const int copy = i * kWarpSize + lane_;
      const int row = copy / Tile::kChunks, chunk = copy % Tile::kChunks;
      const int64_t from = __shfl_sync(0xffffffffu, offset, (first_lane + row) % kWarpSize);
      if (kWhole || copy < kCopies) {
        const uint32_t to = tile + Tile::Offset(first_row + row, chunk);
        if (from >= 0) {
          ptx::CpAsync16(to, pool_ + from + chunk * kUnitsPerChunk);
        } else {
          // Rows past the chunk's end are zeros: 0 x NaN of a stale row would not be.
          ptx::StoreSharedZero16(to);
        }
      }
    }
  }

  const int32_t* pages_;
  const Pool* pool_;
  int64_t page_stride_, token_stride_;
  const Divisor& page_size_;
  int kv_begin_, kv_count_;
  int lane_, first_row_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KV_GATHER_CUH_
