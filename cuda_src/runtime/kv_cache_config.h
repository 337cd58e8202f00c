// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#ifndef TVM_FLASHINFER_RUNTIME_KV_CACHE_CONFIG_H_
#define TVM_FLASHINFER_RUNTIME_KV_CACHE_CONFIG_H_

#include <tvm_flashinfer/compose.h>

#include <algorithm>
#include <cstdint>

namespace tvm_flashinfer {

/*! \brief Bounds and dimensions of a cache. */
struct KVCacheConfig {
  int32_t max_batch;
  int32_t max_total_seq_len;  //!< tokens the pool holds
  int32_t prefill_chunk;      //!< most query tokens of one step
  int32_t page_size;
  bool sliding_window;             //!< sequences may have a window
  int32_t layer_begin, layer_end;  //!< this cache's layers: a pipeline stage holds a range
  int32_t num_qo_heads, num_kv_heads;
  int32_t head_dim_qk, head_dim_vo;
  //! Latent attention: one row a token, whose first head_dim_vo elements are its value.
  bool mla = false;
  FormatChoice format = FormatChoice::kAuto;  //!< who decides which prefixes a step shares

  int32_t num_layers() const { return layer_end - layer_begin; }
  /*! A slid window starts and ends within a page: two more pages a sequence. */
  int32_t num_pages() const {
    return (max_total_seq_len + page_size - 1) / page_size + (sliding_window ? 2 * max_batch : 0);
  }
  //! A decode step has a token per sequence, whatever the prefill chunk.
  int32_t max_q_tokens() const { return std::max(prefill_chunk, max_batch); }
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_KV_CACHE_CONFIG_H_
