// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Prefetching rows of a KV pool while others are computed.
#ifndef TVM_FLASHINFER_CPU_ROW_PREFETCH_H_
#define TVM_FLASHINFER_CPU_ROW_PREFETCH_H_

#include <cstdint>

#include "simd.h"

namespace tvm_flashinfer {
namespace cpu {

/*!
 * \brief Prefetches rows of one head in the order of their addresses, a line whenever a line of the
 * rows before them is loaded.
 *
 * A core has some twenty buffers for lines on their way, and loads that find them all taken by
 * prefetches wait; in order, the hardware's own prefetchers see a stream and take part.
 * \tparam kLines Cache lines of a row.
 */
template <typename T, int kLines>
struct RowPrefetch {
  const T* const* rows;  //!< of the first head
  int64_t offset;        //!< elements from there to this one

  /*! The rows from `row` on. */
  RowPrefetch From(int row) const { return {rows + row, offset}; }
  /*! The i-th line of the rows. */
  void Line(int i) const {
    Prefetch(reinterpret_cast<const char*>(rows[i / kLines] + offset) + i % kLines * 64);
  }
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_ROW_PREFETCH_H_
