// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Gathers block-sparse KV rows into shared memory: page table -> cp.async, any page size.
#ifndef TVM_FLASHINFER_CUDA_KV_GATHER_CUH_
#define TVM_FLASHINFER_CUDA_KV_GATHER_CUH_

#include "../params.h"
#include "block_layout.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief The KV of one work item, as one warp loads it. */
template <typename C>
class KVGather {
 public:
  using T = typename C::T;
  /*! A warp loads this many rows of its slice, one lane knowing the address of each. */
  static constexpr int kRowsPerWarp = C::kSliceKV / C::kWarpsQ;
  static_assert(kRowsPerWarp <= kWarpSize && C::kSliceKV % C::kWarpsQ == 0,
                "a lane holds at most one row's offset");

  /*! \brief Where a warp's rows of one step lie in the pools, as element offsets. */
  struct Rows {
    int64_t k, v;      //!< of the first row if `in_one_page`, else of this lane's; -1: no such token
    bool in_one_page;  //!< all rows are there and follow each other in one page
  };

  __device__ __forceinline__ KVGather(const AttentionParams& p, const WorkItem& item,
                                      const BlockLayout<C>& at)
      : pages_(p.plan.Pages(item.level, item.row)),
        k_(static_cast<const T*>(p.k) + item.head * p.k_strides.head),
        v_(static_cast<const T*>(p.v) + item.head * p.v_strides.head),
        k_strides_(p.k_strides),
        v_strides_(p.v_strides),
        page_size_(static_cast<uint32_t>(p.page_size)),
        page_shift_((page_size_ & (page_size_ - 1)) == 0 ? ptx::HighestBit(page_size_) : -1),
        kv_begin_(item.kv_begin),
        kv_count_(item.kv_count),
        lane_(at.lane),
        first_row_(at.warp_q * kRowsPerWarp),
        slice_(at.slice) {}

  /*!
   * \brief Look up the pages of the slice of a step. Nothing depends on the answer until the copy
   * is issued, so a lookup one step ahead costs no waiting.
   */
  __device__ __forceinline__ Rows Resolve(int step) const {
    const int first = (step * C::kSlices + slice_) * C::kSliceKV + first_row_;
    Rows rows{-1, -1, false};
    if (first >= kv_count_) return rows;
    uint32_t page, entry;
    Locate(static_cast<uint32_t>(kv_begin_ + first), &page, &entry);
    rows.in_one_page = entry + kRowsPerWarp <= page_size_ && first + kRowsPerWarp <= kv_count_;
    if (!rows.in_one_page) {
      if (lane_ >= kRowsPerWarp || first + lane_ >= kv_count_) return rows;
      Locate(static_cast<uint32_t>(kv_begin_ + first + lane_), &page, &entry);
    }
    const int64_t id = pages_[page];
    rows.k = id * k_strides_.page + entry * k_strides_.token;
    rows.v = id * v_strides_.page + entry * v_strides_.token;
    return rows;
  }

  __device__ __forceinline__ void LoadK(const Rows& rows, uint32_t tile) const {
    Load<typename C::KTile>(k_, rows.k, static_cast<int>(k_strides_.token), rows.in_one_page, tile);
  }
  __device__ __forceinline__ void LoadV(const Rows& rows, uint32_t tile) const {
    Load<typename C::VTile>(v_, rows.v, static_cast<int>(v_strides_.token), rows.in_one_page, tile);
  }

 private:
  __device__ __forceinline__ void Locate(uint32_t token, uint32_t* page, uint32_t* entry) const {
    *page = page_shift_ >= 0 ? token >> page_shift_ : token / page_size_;
    *entry = token - *page * page_size_;
  }

  template <typename Tile>
  __device__ __forceinline__ void Load(const T* pool, int64_t offset, int token_stride,
                                       bool in_one_page, uint32_t tile) const {
    constexpr int kCopies = kRowsPerWarp * Tile::kChunks;
    constexpr bool kWhole = kCopies % kWarpSize == 0;
    if (in_one_page) {
      const T* from = pool + offset;
#pragma unroll
      for (int i = 0; i < CeilDiv(kCopies, kWarpSize); ++i) {
        const int copy = i * kWarpSize + lane_;
        const int row = copy / Tile::kChunks, chunk = copy % Tile::kChunks;
        if (kWhole || copy < kCopies) {
          ptx::CpAsync16(tile + Tile::Offset(first_row_ + row, chunk),
                         from + row * token_stride + chunk * kElementsPerChunk);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < CeilDiv(kCopies, kWarpSize); ++i) {
        const int copy = i * kWarpSize + lane_;
        const int row = copy / Tile::kChunks, chunk = copy % Tile::kChunks;
        const int64_t row_offset = __shfl_sync(0xffffffffu, offset, row % kWarpSize);
        if (kWhole || copy < kCopies) {
          const uint32_t to = tile + Tile::Offset(first_row_ + row, chunk);
          if (row_offset >= 0) {
            ptx::CpAsync16(to, pool + row_offset + chunk * kElementsPerChunk);
          } else {
            // Rows past the chunk's end are zeros: 0 x NaN of a stale row would not be.
            ptx::StoreSharedZero16(to);
          }
        }
      }
    }
  }

  const int32_t* pages_;
  const T* k_;
  const T* v_;
  KVStrides k_strides_, v_strides_;
  uint32_t page_size_;
  int page_shift_;  //!< log2 of the page size, or -1
  int kv_begin_, kv_count_;
  int lane_, first_row_, slice_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KV_GATHER_CUH_
