// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The interface between a compiled CUDA kernel and the runtime: a table of plain C functions. All
// calls into CUDA go through it, so the runtime itself needs no CUDA to be built or loaded, and a
// host compiler can make a table that runs on the emulator.
#ifndef TVM_FLASHINFER_CUDA_KERNEL_H_
#define TVM_FLASHINFER_CUDA_KERNEL_H_

#include <cstdint>

#include "../kernel_traits.h"

namespace tvm_flashinfer {

//! Never that of a CPU table.
inline constexpr int32_t kCudaKernelAbi = 0x1005;

/*!
 * \brief The new tokens of a layer: queries and keys are rotated, keys and values stored, through
 * the variant's transforms of what is stored.
 *
 * Pointers are device pointers; strides are in elements, heads are contiguous.
 */
struct CudaAppendParams {
  const void *q, *k, *v;  //!< element type of the queries
  int64_t q_token_stride, q_head_stride;
  int64_t k_token_stride, k_head_stride;
  int64_t v_token_stride, v_head_stride;
  void* rotated_q;        //!< [token, query head, head_dim_qk]; null: nothing is rotated
  void* twin_q;           //!< the same, rotated by `positions`; null: queries have no twins
  void *k_pool, *v_pool;  //!< element type of the pool; without v_pool values are not stored
  KVStrides k_strides, v_strides;
  const int64_t* slots;      //!< [token] page * page_size + slot; negative: drop
  const int32_t* positions;  //!< [token] in its request; null: all 0
  const int32_t* origins;    //!< [token] positions that queries and keys are rotated by
  const float* frequencies;  //!< [rotary_dim / 2]: radians per position
  const void* variant_params;
  float magnitude;
  int32_t rotary_dim;
  int32_t interleaved;  //!< pairs are (2i, 2i + 1); else (i, i + rotary_dim / 2)
  int32_t num_qo_heads, num_kv_heads;
  int32_t page_size;
};

/*! \brief Two states of the same queries, and where their merged state goes; it may be one of them.
 */
struct CudaMergeParams {
  const void *o_a, *o_b;       //!< element type of the queries; elements of a head are contiguous
  const float *lse_a, *lse_b;  //!< [token, head], natural-log
  void* o;
  float* lse;
  int64_t o_a_token_stride, o_a_head_stride;  //!< in elements
  int64_t o_b_token_stride, o_b_head_stride;
  int64_t o_token_stride, o_head_stride;
  int32_t num_tokens, num_heads, dim;
};

/*!
 * \brief Tokens that change places: row i of `to` is row order[i] of `from`; or, on the way back,
 * row order[i] of `to` is row i of `from`.
 *
 * Heads and all distances are multiples of 16 bytes.
 */
struct CudaMoveParams {
  const void* from;
  void* to;
  const float* lse_from;  //!< [token, head], dense
  float* lse_to;          //!< null: there is none to move
  const int32_t* order;   //!< [num_tokens]
  int64_t from_token_bytes, from_head_bytes;
  int64_t to_token_bytes, to_head_bytes;
  int32_t num_tokens, num_heads, head_bytes;
  int32_t back;
};

/*! \brief Functions return null, or what went wrong. Streams are cudaStream_t. */
struct CudaKernel : KernelTraits {
  int32_t device_type;  //!< DLPack's: CUDA, or CPU where the table runs on the emulator
  int32_t num_tiles;
  int32_t tiles[4];  //!< packed rows of the query tiles it was compiled for, ascending
  //! What a KV token costs a tile: 64 where it is read for a few rows, or multiplied with 64.
  int32_t tile_costs[4];
  /*! \brief Blocks of a tile's kernel that are resident at once on the current device. */
  const char* (*num_workers)(int32_t tile_rows, int32_t* blocks);
  const char* (*run)(const AttentionParams* params, int32_t tile_rows, int32_t num_workers,
                     void* stream);
  const char* (*append)(const CudaAppendParams* params, int32_t num_tokens, void* stream);
  const char* (*merge)(const CudaMergeParams* params, void* stream);
  const char* (*move)(const CudaMoveParams* params, void* stream);
  /*! \brief Copy in any direction, in the stream's order. */
  const char* (*copy)(void* to, const void* from, int64_t bytes, void* stream);
  /*! \brief Page-locked host memory. */
  const char* (*host_alloc)(void** memory, int64_t bytes);
  void (*host_free)(void* memory);
  /*! \brief An event marks a place in a stream; `event_wait` blocks the host until it is passed. */
  const char* (*event_create)(void** event);
  const char* (*event_record)(void* event, void* stream);
  const char* (*event_wait)(void* event);
  void (*event_destroy)(void* event);
  /*! \brief Whether what is launched on a stream becomes part of a CUDA graph. */
  const char* (*is_capturing)(void* stream, int32_t* capturing);
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KERNEL_H_
