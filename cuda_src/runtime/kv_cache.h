// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The KV cache that TVM's VM and MLC's engine drive: a paged pool, block-sparse by nature, whose
// begin_forward makes one plan that every layer of the step runs.
#ifndef TVM_FLASHINFER_RUNTIME_KV_CACHE_H_
#define TVM_FLASHINFER_RUNTIME_KV_CACHE_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/tensor.h>
#include <tvm_flashinfer/schedule.h>
#include <vm/kv_state.h>

#include <cstdint>
#include <vector>

#include "cpu_executor.h"
#include "page_table.h"

namespace tvm_flashinfer {

using tvm::ffi::Shape;
using tvm::runtime::Tensor;

/*! \brief Bounds and dimensions of a cache. */
struct KVCacheConfig {
  int32_t max_batch;
  int32_t max_total_seq_len;  //!< tokens the pool holds
  int32_t prefill_chunk;      //!< most query tokens of one step
  int32_t page_size;
  int32_t layer_begin, layer_end;  //!< this cache's layers: a pipeline stage holds a range
  int32_t num_qo_heads, num_kv_heads;
  int32_t head_dim_qk, head_dim_vo;

  int32_t num_layers() const { return layer_end - layer_begin; }
  int32_t num_pages() const { return (max_total_seq_len + page_size - 1) / page_size; }
  //! A decode step has a token per sequence, whatever the prefill chunk.
  int32_t max_q_tokens() const { return std::max(prefill_chunk, max_batch); }
};

/*! \brief Strided (token, head, element) operand; elements are contiguous. */
struct TokenHeads {
  void* data;
  int64_t token_stride, head_stride;
};

class KVCacheObj : public tvm::runtime::vm::AttentionKVCacheObj {
 public:
  /*! \param dtype, device Of the pool. */
  KVCacheObj(const KVCacheConfig& config, KernelHandle kernel, DLDataType dtype, DLDevice device);

  // Sequences.
  void Clear() final;
  void AddSequence(int64_t seq_id) final;
  void RemoveSequence(int64_t seq_id) final;
  void ForkSequence(int64_t parent_seq_id, int64_t child_seq_id, int64_t fork_pos) final;
  void PopN(int64_t seq_id, int32_t n) final;
  bool Empty() const final;
  int32_t GetNumAvailablePages() const final;
  int32_t GetTotalSequenceLength() const final;
  int32_t GetSequenceLength(int64_t seq_id) const final;

  // A step.
  void BeginForward(const Shape& seq_ids, const Shape& append_lengths,
                    const tvm::ffi::Optional<Shape>& token_tree_parent_ptr) final;
  void EndForward() final;
  Tensor GetQueryPositions() final;
  void AttentionWithFusedQKV(int64_t layer_id, Tensor qkv_data, tvm::ffi::Optional<Tensor> mask,
                             Tensor o_data, double sm_scale) final;
  /*!
   * \brief Append k and v, then attend: the step's attention of one layer.
   * \param head_major q, k, v are (heads, tokens, dim); else (tokens, heads, dim). `o` is always
   * (tokens, heads, dim).
   */
  void Attention(int64_t layer_id, double sm_scale, const DLTensor& q, const DLTensor& k,
                 const DLTensor& v, const DLTensor& o, bool head_major);

  // Inspection.
  void DebugGetKV(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor k_data,
                  Tensor v_data) final;
  void DebugSetKV(int64_t seq_id, int64_t start_pos, Tensor k_data, Tensor v_data) final;

  // Parts of TVM's contract that this cache doesn't serve: each throws and says so.
  void EnableSlidingWindowForSeq(int64_t, int32_t, int32_t) final;
  void CommitAcceptedTokenTreeNodes(const Shape&, const Shape&) final;
  tvm::ffi::String GetCheckpointMetadata(int64_t) const final;
  tvm::ffi::String GetLayoutHash() const final;
  void ExportPageGroup(int64_t, int64_t, Tensor) final;
  void PrepareImport(int64_t, tvm::ffi::String) final;
  void ImportPageGroup(int64_t, int64_t, Tensor) final;
  void FinishImport(int64_t) final;
  Shape DisaggPrepareRecv(int64_t, int) final;
  void DisaggMarkSend(int64_t, int64_t, const Shape&, int32_t) final;
  void SelfAttention(int64_t, Tensor, Tensor, Tensor, Tensor, Tensor, double) final;
  void CrossAttention(int64_t, Tensor, Tensor, Tensor, double) final;
  void AttentionWithSharedKV(int64_t, Tensor, Tensor, Tensor, Tensor, double) final;
  void AppendMLAKV(int64_t, Tensor) final;
  tvm::ffi::Array<Tensor> MergeAttnOutputInplace(Tensor, Tensor, Tensor, Tensor) final;
  void LinearAttention(int64_t, Tensor, Tensor, Tensor, double) final;
  void DebugGetKVMLA(int64_t, int64_t, int64_t, Tensor) final;

  static constexpr const bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("tvm_flashinfer.KVCache", KVCacheObj,
                                    tvm::runtime::vm::AttentionKVCacheObj);

 private:
  /*! The pool of one layer: keys and values of a page lie side by side, as in TVM's cache. */
  struct LayerPool {
    Tensor data;
    char* k;
    char* v;
  };
  static PlanBounds MakeBounds(const KVCacheConfig& config, const CpuKernel& kernel);

  int32_t CheckStep(int64_t layer_id) const;
  void CheckIdle(const char* what) const;
  void Schedule(const Shape& append_lengths);
  void Attend(int32_t layer, double sm_scale, TokenHeads q, TokenHeads k, TokenHeads v,
              TokenHeads o);
  void AppendTo(char* pool, const KVStrides& strides, TokenHeads source, int32_t dim);
  void CopyPages();
  template <typename Copy>
  void ForEachRow(int64_t seq_id, int64_t start, int64_t end, const Copy& copy);
  void CheckDebugTensors(const Tensor& k, const Tensor& v, int64_t length) const;

  KVCacheConfig config_;
  KernelHandle kernel_;
  DLDataType dtype_;
  DLDevice device_;
  int32_t element_bytes_;
  KVStrides k_strides_, v_strides_;
  std::vector<LayerPool> layers_;
  PageTable pages_;
  PlanBounds bounds_;
  Scheduler scheduler_;
  CpuExecutor executor_;

  // The step between begin_forward and end_forward.
  bool in_forward_ = false;
  int32_t num_tokens_ = 0;
  std::vector<AppendRequest> requests_;
  std::vector<PageCopy> copies_;
  std::vector<int32_t> qo_indptr_, kv_indptr_, kv_indices_, kv_len_, last_block_len_;
  std::vector<int64_t> slots_;
  std::vector<int32_t> plans_[2];  //!< double-buffered: a new plan leaves the running one alone
  int32_t plan_ = 0;
  std::vector<float> o_partial_, lse_partial_;
  Tensor positions_;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_KV_CACHE_H_
