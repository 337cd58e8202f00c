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

  /*! \brief Element offsets of this lane's row in the pools; -1: no such token. */
  struct Rows {
    int64_t k, v;
  };

  __device__ __forceinline__ KVGather(const AttentionParams& p, const WorkItem& item,
                                      const BlockLayout<C>& at)
      : pages_(p.plan.Pages(item.level, item.row)),
        k_(static_cast<const T*>(p.k) + item.head * p.k_strides.head),
        v_(static_cast<const T*>(p.v) + item.head * p.v_strides.head),
        k_strides_(p.k_strides),
        v_strides_(p.v_strides),
        page_size_(static_cast<uint32_t>(p.page_size)),
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
    const int token = (step * C::kSlices + slice_) * C::kSliceKV + first_row_ + lane_;
    Rows rows{-1, -1};
    if (lane_ < kRowsPerWarp && token < kv_count_) {
      const uint32_t at = static_cast<uint32_t>(kv_begin_ + token);
      const uint32_t entry = at % page_size_;
      const int64_t page = pages_[at / page_size_];
      rows.k = page * k_strides_.page + entry * k_strides_.token;
      rows.v = page * v_strides_.page + entry * v_strides_.token;
    }
    return rows;
  }

  __device__ __forceinline__ void LoadK(const Rows& rows, uint32_t tile) const {
    Load<typename C::KTile>(k_, rows.k, tile);
  }
  __device__ __forceinline__ void LoadV(const Rows& rows, uint32_t tile) const {
    Load<typename C::VTile>(v_, rows.v, tile);
  }

 private:
  template <typename Tile>
  __device__ __forceinline__ void Load(const T* pool, int64_t lane_offset, uint32_t tile) const {
    constexpr int kCopies = kRowsPerWarp * Tile::kChunks;
#pragma unroll
    for (int i = 0; i < CeilDiv(kCopies, kWarpSize); ++i) {
      const int copy = i * kWarpSize + lane_;
      const int row = copy / Tile::kChunks;
      const int chunk = copy % Tile::kChunks;
      const int64_t offset = __shfl_sync(0xffffffffu, lane_offset, row % kWarpSize);
      if (kCopies % kWarpSize == 0 || copy < kCopies) {
        // Rows past the chunk's end are zeros: 0 x NaN of a stale row would not be.
        const bool valid = offset >= 0;
        ptx::CpAsync16(tile + Tile::Offset(first_row_ + row, chunk),
                       pool + (valid ? offset : 0) + chunk * kElementsPerChunk, valid);
      }
    }
  }

  const int32_t* pages_;
  const T* k_;
  const T* v_;
  KVStrides k_strides_, v_strides_;
  uint32_t page_size_;
  int kv_begin_, kv_count_;
  int lane_, first_row_, slice_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KV_GATHER_CUH_
