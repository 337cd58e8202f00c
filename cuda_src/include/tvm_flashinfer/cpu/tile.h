// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What both CPU paths need of a work item: what its rows are, and where its KV rows lie.
#ifndef TVM_FLASHINFER_CPU_TILE_H_
#define TVM_FLASHINFER_CPU_TILE_H_

#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "../variant.h"
#include "simd.h"

namespace tvm_flashinfer {
namespace cpu {

/*! \brief Walks the tokens of one row and KV head through the page table. */
template <typename T>
class KVRows {
 public:
  //! Cache lines of a row of kDim elements.
  template <int kDim>
  static constexpr int kLines =
      (kDim / kElementsPerUnit<T> * static_cast<int>(sizeof(T)) + 63) / 64;

  KVRows(const void* pool, const KVStrides& strides, const AttentionParams& p, const WorkItem& item)
      : base_(static_cast<const T*>(pool) + item.head * strides.head),
        strides_(strides),
        pages_(p.plan.Pages(item.level, item.row)),
        page_size_(p.page_size) {}

  /*! \brief Fill rows[0, count) with pointers to tokens [begin, begin + count). */
  void Gather(int32_t begin, int32_t count, const T** rows) const {
    int32_t page = begin / page_size_;
    int32_t slot = begin - page * page_size_;
    for (int32_t i = 0; i < count; ++page, slot = 0) {
      const T* row = base_ + pages_[page] * strides_.page + slot * strides_.token;
      const int32_t end = std::min(count, i + page_size_ - slot);
      for (; i < end; ++i, row += strides_.token) rows[i] = row;
    }
  }

  /*! \brief Fill slots[0, count) with the places of those tokens: page * page_size + offset. */
  void Slots(int32_t begin, int32_t count, int32_t* slots) const {
    for (int32_t i = 0; i < count; ++i) {
      const int32_t page = (begin + i) / page_size_;
      slots[i] = pages_[page] * page_size_ + (begin + i) % page_size_;
    }
  }

 private:
  const T* base_;
  KVStrides strides_;
  const int32_t* pages_;
  int32_t page_size_;
};

/*! \brief The packed rows of an item: (token, head of the GQA group), token-major. */
struct PackedRows {
  PackedRows(const AttentionParams& p, const WorkItem& item)
      : group(p.num_qo_heads / p.num_kv_heads),
        q_begin(item.q_begin),
        head_begin(item.head * group),
        count(item.q_count * group) {}
  int32_t Token(int32_t row) const { return q_begin + row / group; }
  int32_t Head(int32_t row) const { return head_begin + row % group; }

  int32_t group, q_begin, head_begin, count;
};

/*! \brief Lowest and highest query position of an item. */
inline void QueryRange(const AttentionParams& p, const WorkItem& item, TileRange* range) {
  range->q_lo = INT32_MAX;
  range->q_hi = INT32_MIN;
  for (int32_t t = item.q_begin; t < item.q_begin + item.q_count; ++t) {
    range->q_lo = std::min(range->q_lo, p.plan.q_position[t]);
    range->q_hi = std::max(range->q_hi, p.plan.q_position[t]);
  }
}

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_TILE_H_
