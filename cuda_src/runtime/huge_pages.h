// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Huge pages for memory that is read in an order the hardware can't foresee.
#ifndef TVM_FLASHINFER_RUNTIME_HUGE_PAGES_H_
#define TVM_FLASHINFER_RUNTIME_HUGE_PAGES_H_

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tvm_flashinfer {

/*!
 * \brief Ask the system to back untouched host memory with huge pages, where it has any left.
 *
 * Pages of a KV pool are visited in the order of a page table: with 4 KiB of memory mapped at a
 * time, that is a miss of the translation cache every few lines (a sixth of decoding's rate).
 */
inline void PreferHugePages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  // A wish: without it, or where it is refused, the memory works as it is.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_HUGE_PAGES_H_
