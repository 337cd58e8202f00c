// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The interface between a compiled CPU kernel and the runtime: a table of plain C functions. A
// kernel library holds one table per (dtypes, head sizes, variant) and knows nothing of TVM, so the
// runtime owns threads and memory, and an exported model links kernels as one object file.
#ifndef TVM_FLASHINFER_CPU_KERNEL_H_
#define TVM_FLASHINFER_CPU_KERNEL_H_

#include <cstdint>

#include "../kernel_traits.h"

namespace tvm_flashinfer {

//! Changes with the layout of anything a kernel shares with the runtime.
inline constexpr int32_t kCpuKernelAbi = 4;

/*! \brief New keys or values, and where in the pool they go. */
struct AppendParams {
  const void* source;  //!< element type of the queries
  int64_t source_token_stride, source_head_stride;
  void* pool;  //!< element type of the KV pool
  KVStrides strides;
  const int64_t* slots;      //!< [token] page * page_size + slot; negative: drop
  const int32_t* positions;  //!< [token] in its request; null: the variant doesn't ask
  const void* variant_params;
  int32_t page_size;
  int32_t num_heads;
  bool values;  //!< they are values, not keys
};

struct CpuKernel : KernelTraits {
  //! Items of up to row_tiles[0] packed rows that differ in their head only and are best run as
  //! one.
  int32_t max_heads;
  int64_t (*scratch_bytes)(int32_t max_rows);
  /*!
   * \brief Compute `count` work items that differ in their head only, by one from each to the next.
   * \param count At most max_heads, and 1 for items of more than row_tiles[0] packed rows.
   * \param scratch 64-byte aligned, and the caller's alone.
   */
  void (*run_items)(const AttentionParams* params, const WorkItem* items, int32_t count,
                    void* scratch);
  /*! \brief Merge the partial states of query tokens [begin, end) that have any. */
  void (*merge)(const AttentionParams* params, int32_t begin, int32_t end);
  /*! \brief Store new keys or values of tokens [begin, end) into the pool. */
  void (*append)(const AppendParams* params, int32_t begin, int32_t end);
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_KERNEL_H_
