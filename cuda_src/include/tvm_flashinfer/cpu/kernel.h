// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The interface between a compiled CPU kernel and the runtime: a table of plain C functions. A
// kernel library holds one table per (dtypes, head sizes, variant) and knows nothing of TVM, so the
// runtime owns threads and memory, and an exported model links kernels as one object file.
#ifndef TVM_FLASHINFER_CPU_KERNEL_H_
#define TVM_FLASHINFER_CPU_KERNEL_H_

#include <cstdint>

#include "../interval.h"
#include "../params.h"
#include "../variant.h"

namespace tvm_flashinfer {

//! Changes with the layout of anything a kernel shares with the runtime.
inline constexpr int32_t kCpuKernelAbi = 2;

/*! \brief Element types a kernel may be compiled for; values are part of the ABI. */
enum class ElementType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

/*! \brief New keys or values, and where in the pool they go. */
struct AppendParams {
  const void* source;  //!< element type of the queries
  int64_t source_token_stride, source_head_stride;
  void* pool;  //!< element type of the KV pool
  KVStrides strides;
  const int64_t* slots;  //!< [token] page * page_size + slot; negative: drop
  int32_t page_size;
  int32_t num_heads;
  int32_t dim;
};

struct CpuKernel {
  int32_t abi;
  ElementType q_type;   //!< of queries, new keys and values, and outputs
  ElementType kv_type;  //!< of the KV pool
  int32_t head_dim_qk;
  int32_t head_dim_vo;
  int32_t num_params;          //!< parameters of the variant, passed to a run as VariantArgs
  const VariantParam* params;  //!< [num_params]
  int32_t causal;              //!< the variant hides keys after the query: the scheduler skips them
  int32_t row_tiles[2];        //!< packed rows of the decode and of the prefill tile
  int32_t kv_align;
  /*! \brief Index of a parameter that elements in `at` may read past its end, or -1. */
  int32_t (*out_of_bounds_param)(const VariantArgs* args, const ElementIndex<Interval>* at);
  int64_t (*scratch_bytes)(int32_t max_rows);
  /*! \brief Compute one work item. `scratch` is 64-byte aligned and the caller's alone. */
  void (*run_item)(const AttentionParams* params, const WorkItem* item, void* scratch);
  /*! \brief Merge the partial states of query tokens [begin, end) that have any. */
  void (*merge)(const AttentionParams* params, int32_t begin, int32_t end);
  /*! \brief Store new keys or values of tokens [begin, end) into the pool. */
  void (*append)(const AppendParams* params, int32_t begin, int32_t end);
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_KERNEL_H_
