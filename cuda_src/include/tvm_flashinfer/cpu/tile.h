// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What both CPU paths need of a work item: where its KV rows lie, and where its states go.
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

/*! \brief Where the state of one packed row goes: a partial row, or the run's own output. */
template <typename TO, int kDimVO>
struct StateWriter {
  StateWriter(const AttentionParams& params, const WorkItem& work)
      : p(params), item(work), rows(params, work) {}

  /*! \param value Callable d -> normalised output. */
  template <typename Value>
  void Write(int32_t row, float lse, const Value& value) const {
    const int32_t token = rows.Token(row);
    const int32_t head = rows.Head(row);
    if (item.partial >= 0) {
      const int64_t at = int64_t{item.partial + token - item.q_begin} * p.num_qo_heads + head;
      float* o = p.o_partial + at * kDimVO;
      for (int d = 0; d < kDimVO; ++d) o[d] = value(d);
      p.lse_partial[at] = lse;
      return;
    }
    TO* o = static_cast<TO*>(p.o) + token * p.o_token_stride + head * p.o_head_stride;
    for (int d = 0; d < kDimVO; ++d) o[d] = FromFloat<TO>(value(d));
    if (p.lse != nullptr) p.lse[int64_t{token} * p.num_qo_heads + head] = lse;
  }

  const AttentionParams& p;
  const WorkItem& item;
  PackedRows rows;
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_TILE_H_
