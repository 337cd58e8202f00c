// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Prefetching rows of a KV pool while others are computed.
#ifndef TVM_FLASHINFER_CPU_ROW_PREFETCH_H_
#define TVM_FLASHINFER_CPU_ROW_PREFETCH_H_

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace tvm_flashinfer {
namespace cpu {

/*!
 * \brief Prefetches rows of one head, line after line.
 *
 * A few lines at a time: a core has some twenty buffers for lines on their way, and loads that find
 * them all taken by prefetches wait.
 */
template <typename T>
class RowPrefetch {
 public:
  /*!
   * \param rows [count] pointers to rows; \param offset Elements from there to what is prefetched.
   * \param lines Cache lines of a row.
   */
  RowPrefetch(const T* const* rows, int32_t count, int64_t offset, int lines)
      : rows_(rows),
        end_(rows + count),
        bytes_(offset * static_cast<int64_t>(sizeof(T))),
        row_bytes_(lines * 64),
        line_(bytes_) {}

  /*! Prefetch the next `lines` of them. */
  void Advance(int lines) {
    for (int i = 0; i < lines && rows_ < end_; ++i) {
      Prefetch(reinterpret_cast<const char*>(*rows_) + line_);
      line_ += 64;
      if (line_ - bytes_ == row_bytes_) {
        line_ = bytes_;
        ++rows_;
      }
    }
  }

 private:
  const T* const* rows_;
  const T* const* end_;
  int64_t bytes_, row_bytes_, line_;
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_ROW_PREFETCH_H_
