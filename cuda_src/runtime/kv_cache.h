// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The KV cache that TVM's VM and MLC's engine drive: a paged pool, block-sparse by nature, whose
// begin_forward makes one plan that every layer of the step runs.
#ifndef TVM_FLASHINFER_RUNTIME_KV_CACHE_H_
#define TVM_FLASHINFER_RUNTIME_KV_CACHE_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernel_handle.h"
#include "kv_cache_config.h"
#include "page_table.h"
#include "rope.h"
#include "step_layout.h"
#include "step_runner.h"
#include "token_heads.h"
#include "tvm_kv_state.h"
#include "variant_args.h"

namespace tvm_flashinfer {

using tvm::ffi::Shape;
using tvm::runtime::Tensor;

/*!
 * \brief Rotation by a compiled model's own function, as TVM's cache calls it: with (qkv,
 * positions, q, k, v, 1 or the extension factors) it splits the fused tensor and rotates queries
 * and keys.
 */
struct SplitRotary {
  tvm::ffi::Function function;
  tvm::ffi::Optional<Tensor> extension_factors;
};

class KVCacheObj : public AttentionKVCacheInterface {
 public:
  /*!
   * \param dtype, device Of the pool.
   * \param rope Rotates new queries and keys; absent: they are stored and attended as they come.
   */
  KVCacheObj(const KVCacheConfig& config, KernelHandle kernel, DLDataType dtype, DLDevice device,
             std::optional<RopeConfig> rope = std::nullopt);

  /*! \brief Rotate with `rotary`, which serves attention with fused QKV only. */
  void UseSplitRotary(SplitRotary rotary);

  /*!
   * \brief debug_get_kv and debug_set_kv take keys as they are before they are rotated.
   * \throws ValueError if the rotation is not undone by the opposite position: UseRotatingKernel.
   */
  void UseInlineRope();
  /*!
   * \brief Keys are stored as they come, and rotated by the kernel whenever it reads them.
   *
   * A slid window needs no second rotation then, so any variant may see it whole. Kernels have a
   * variant whose last parameter is `rope_table`, a table that the cache makes of its rotation (see
   * variants.rope_table in Python), after those of UseVariant.
   *
   * \param rotary_dim, interleaved What the kernels were compiled for.
   */
  void UseRotatingKernel(int32_t rotary_dim, bool interleaved);

  /*!
   * \brief Parameters of the kernel's variant, the same in every layer; they are kept.
   * \param values One per parameter that the variant declares, a number or a tensor.
   * \param ignores_positions Nothing in the variant depends on where a query or a key stands, but
   * that later keys are hidden.
   * \param merges States of parts of the keys merge, whatever heads the parts have: attention in
   * parts may be called.
   *
   * Tensors must cover every position and head that this cache may hold. Layers with a window take
   * the same values after the window's.
   */
  void UseVariant(const tvm::ffi::Array<tvm::ffi::Any>& values, bool ignores_positions = false,
                  bool merges = false);

  /*!
   * \brief Give some layers a kernel, a window and a rotation of their own.
   * \param layers The layers, numbered as those of the model.
   * \param kernel As the cache's, of another variant. With a window, the first parameter is the
   * tokens that a query sees before itself.
   * \param window Tokens that a query sees, itself included; 0: whole sequences.
   * \param rope Rotates these layers' new queries and keys; absent: they come as they are attended.
   */
  void UseLayers(const Shape& layers, KernelHandle kernel, int32_t window,
                 std::optional<RopeConfig> rope);
  /*!
   * \brief Give some layers a window and nothing else of their own.
   * \param kernel Of a variant whose first parameter is the window's; those of the cache's own
   * variant follow.
   */
  void UseSlidingLayers(const Shape& layers, int32_t window, KernelHandle kernel);

  /*!
   * \brief Serve SelfAttention by a kernel of its own: latent attention expands keys and values.
   * \param num_kv_heads Heads of its keys and values.
   */
  void UseSelfKernel(int32_t num_kv_heads, KernelHandle kernel);

  // Sequences.
  void Clear() final;
  void AddSequence(int64_t seq_id) final;
  void RemoveSequence(int64_t seq_id) final;
  void ForkSequence(int64_t parent_seq_id, int64_t child_seq_id, int64_t fork_pos) final;
  void PopN(int64_t seq_id, int32_t n) final;
  void EnableSlidingWindowForSeq(int64_t seq_id, int32_t sliding_window_size,
                                 int32_t attn_sink_size) final;
  bool Empty() const final;
  int32_t GetNumAvailablePages() const final;
  int32_t GetTotalSequenceLength() const final;
  int32_t GetSequenceLength(int64_t seq_id) const final;

  // A step.
  void BeginForward(const Shape& seq_ids, const Shape& append_lengths,
                    const tvm::ffi::Optional<Shape>& token_tree_parent_ptr) final;
  void EndForward() final;
  void CommitAcceptedTokenTreeNodes(const Shape& seq_ids, const Shape& leaf_indices) final;
  Tensor GetQueryPositions() final;
  /*! \brief The same of a step padded to `num_tokens`; those of the padding mean nothing. */
  Tensor PaddedQueryPositions(int64_t num_tokens);

  // Attention.
  /*!
   * \brief Append, then attend.
   * \param mask bool, int8 or uint8 [sum of new^2]: of each sequence of the step a matrix (new
   * token, new token), whose entry says whether the row sees the column. It takes the place of
   * causality; the tokens before the step are seen by all. A layer's window holds besides, and of a
   * token tree a node sees those of its ancestors that the mask shows.
   */
  void AttentionWithFusedQKV(int64_t layer_id, Tensor qkv_data, tvm::ffi::Optional<Tensor> mask,
                             Tensor o_data, double sm_scale) final;
  /*! \brief Attend keys that `source_layer_id` appended in this step; q carries RoPE already. */
  void AttentionWithSharedKV(int64_t source_layer_id, Tensor q_data, Tensor current_k_data,
                             Tensor current_v_data, Tensor o_data, double sm_scale) final;
  /*! \brief Merge a second attention state into the first; LSE is natural-log. */
  tvm::ffi::Array<Tensor> MergeAttnOutputInplace(Tensor o_self_attn, Tensor lse_self_attn,
                                                 Tensor o_cross_attn, Tensor lse_cross_attn) final;
  /*!
   * \brief Append k and v, then attend: the step's attention of one layer.
   * \param head_major q, k, v are (heads, tokens, dim); else (tokens, heads, dim). `o` is always
   * (tokens, heads, dim).
   */
  void Attention(int64_t layer_id, double sm_scale, const DLTensor& q, const DLTensor& k,
                 const DLTensor& v, const DLTensor& o, bool head_major);
  /*!
   * \brief As Attention, of operands inside larger tensors, as a model's projections leave them.
   *
   * Operands may have more tokens than the step: their padding is neither stored nor attended, and
   * nothing is written to it.
   * \param views Nine numbers: of q, k and v the first element, and how far heads and tokens lie
   * apart, in elements.
   * \param values Parameters of the layer's variant, less the window's, if it has any that the
   * cache was not given; nothing of them is kept.
   */
  void AttentionViews(int64_t layer_id, double sm_scale, const Shape& views, const DLTensor& q,
                      const DLTensor& k, const DLTensor& v, const DLTensor& o,
                      tvm::ffi::PackedArgs values);

  /*!
   * \brief What a captured step depends on besides tensors: a CUDA graph captured in one step may
   * be replayed in another whose key is equal.
   */
  int64_t GraphKey() const;

  // The composable format: kv_cache_format.cc.
  /*! \brief Let the cost model choose which prefixes the steps to come share, or overrule it. */
  void UseFormat(FormatChoice choice);
  /*! \brief See StepRunner::PoisonWorkspace. */
  void PoisonWorkspace();
  /*! \brief A copy of a section of the last step's plan, int32; see PlanSection. */
  Tensor PlanSectionOf(const std::string& name) const;

  // Inspection.
  int32_t head_dim_qk() const { return config_.head_dim_qk; }
  void DebugGetKV(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor k_data,
                  Tensor v_data) final;
  void DebugSetKV(int64_t seq_id, int64_t start_pos, Tensor k_data, Tensor v_data) final;

  // Checkpoints of a sequence.
  tvm::ffi::String GetCheckpointMetadata(int64_t seq_id) const final;
  tvm::ffi::String GetLayoutHash() const final;
  void ExportPageGroup(int64_t seq_id, int64_t group_id, Tensor dst) final;
  /*! \brief Make room for a sequence of that id; one that exists is replaced. */
  void PrepareImport(int64_t seq_id, tvm::ffi::String metadata_json) final;
  void ImportPageGroup(int64_t seq_id, int64_t group_id, Tensor src) final;
  void FinishImport(int64_t seq_id) final;

  // Attention in parts: kv_cache_parts.cc.
  /*! \brief Causal attention of each sequence's new tokens among themselves; LSE natural-log. */
  void SelfAttention(int64_t layer_id, Tensor q_data, Tensor k_data, Tensor v_data, Tensor o_data,
                     Tensor lse_data, double sm_scale) final;
  /*!
   * \brief Attention over what the layer holds: its tokens before the step if the step's own were
   * attended by SelfAttention, or if the step has stored none; else all of them, causally.
   */
  void CrossAttention(int64_t layer_id, Tensor q_data, Tensor o_data, Tensor lse_data,
                      double sm_scale) final;
  void AppendMLAKV(int64_t layer_id, Tensor kv_data) final;
  void DebugGetKVMLA(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor kv_data) final;
  /*! \brief As DebugSetKV, of latent attention: rows [layer, token, head_dim_qk]. */
  void DebugSetKVMLA(int64_t seq_id, int64_t start_pos, Tensor kv_data);

  // Prefill and decode on different machines: kv_cache_transfer.cc.
  /*!
   * \brief Make room for `length` tokens that another cache will send.
   * \return Where they go, as [n, begin_1, length_1, ..., begin_n, length_n]: runs of rows of the
   * pool, numbered page * page_size + slot.
   */
  Shape DisaggPrepareRecv(int64_t seq_id, int length) final;
  /*!
   * \brief Send a sequence's tokens from `begin` on: those it has in the next step, those that it
   * gains when they are stored.
   * \param compressed_remote_position_map What the receiver's DisaggPrepareRecv gave.
   */
  void DisaggMarkSend(int64_t seq_id, int64_t begin, const Shape& compressed_remote_position_map,
                      int32_t recver_pe_offset) final;
  /*!
   * \brief Send by `transfer(layer_id, pool, local rows, remote rows, receiver)`; rows are int32.
   */
  void UseTransfer(tvm::ffi::Function transfer) { transfer_ = std::move(transfer); }

  // Throws: see kv_cache_unserved.cc.
  void LinearAttention(int64_t, Tensor, Tensor, Tensor, double) final;

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

  /*! What a step has done with a layer so far. */
  struct LayerState {
    bool stored = false;        //!< the step's keys and values are in the pool
    bool attended_own = false;  //!< by SelfAttention
  };

  /*! What the layers of a group have of their own. */
  struct LayerGroup {
    KernelHandle kernel;
    std::unique_ptr<StepRunner> runner;
    BoundVariantArgs variant;    //!< if the cache was given its variant's parameters
    bool windowed_only = false;  //!< the variant is the cache's, but for the window
  };

  /*! Where a sequence's tokens from `begin` on go. */
  struct Send {
    int64_t begin;
    int32_t dropped;              //!< Sequence::dropped when it was marked
    std::vector<int32_t> remote;  //!< [token - begin]
    int32_t receiver;
    bool past = true;  //!< tokens from before the mark are still to be sent
  };
  /*! The part of it that the step in progress sends. */
  struct StepSend {
    Send* whole;
    std::vector<int32_t> local, remote;
  };
  void PlanSends(const Shape& seq_ids);
  void SendStored(int32_t layer);

  /*! A sequence that has pages already, and what it still waits for. */
  struct Import {
    int64_t seq_id;
    std::vector<bool> done;  //!< [layer]
  };

  void CheckIdle(const char* what) const;
  int32_t CheckStep(int64_t layer_id) const;
  /*! \brief All of begin_forward that can fail; it changes nothing that outlives the step. */
  void PrepareStep(const Shape& seq_ids, const Shape& append_lengths,
                   const tvm::ffi::Optional<Shape>& token_tree_parent_ptr);
  void CommitStep() noexcept;
  void ReadRequests(const Shape& seq_ids, const Shape& append_lengths);
  void ReadTrees(const Shape& seq_ids, const Shape& parents);
  void CheckCommitted(int64_t seq_id, const Sequence& sequence, const char* what) const;
  void Schedule();
  void CopyPages();
  void CopyToken(int64_t from_slot, int64_t to_slot);

  void Append(int32_t layer, TokenHeads* q, TokenHeads k, TokenHeads v, int64_t num_tokens);
  /*!
   * \brief Tokens that a layer's launches cover: with the padding of an operand [token, ...], so
   * that one captured over a step serves others that are padded to the same length.
   */
  int64_t LaunchedTokens(const DLTensor& operand) const;
  /*! \brief Plan attention under a mask, unless the last layer had the same. */
  void PlanMask(int32_t layer, const Tensor& mask);
  void AttendMasked(int32_t layer, double sm_scale, TokenHeads q, TokenHeads o);
  void Attend(int32_t layer, double sm_scale, TokenHeads q, TokenHeads o);
  /*! \brief Attention of every query in two rotations, whose states are merged. */
  void AttendTwins(int32_t layer, const StepLayout& layout, StepRunner* runner, double sm_scale,
                   TokenHeads q, TokenHeads o);
  AttentionParams Operands(int32_t layer, const StepLayout& layout, double sm_scale, TokenHeads q,
                           TokenHeads o) const;
  /*! \brief The layer's group, or null: the layer has what the cache has. */
  const LayerGroup* GroupOf(int32_t layer) const;
  StepRunner* RunnerOf(int32_t layer) const;
  const KernelHandle& KernelOf(int32_t layer) const;
  bool has_windows() const;
  VisitedRange EveryElement() const;
  void BindVariant(int32_t layer, tvm::ffi::PackedArgs values);
  bool rotates() const { return rotates_ || split_rotary_.has_value(); }
  bool stores_rotated() const { return rotates() && !rope_table_.defined(); }
  /*! \brief Split fused `qkv`, and rotate its queries and keys, with the model's own function. */
  template <typename Queries>
  void Rotate(const Tensor& qkv, const Tensor& positions, const Queries& q, const Tensor& k,
              const Tensor& v) const {
    const auto& [function, factors] = *split_rotary_;
    DLTensor at = *positions.operator->();  // compiled functions take no tensor with an offset
    at.data = static_cast<char*>(at.data) + at.byte_offset;
    at.byte_offset = 0;
    if (factors.has_value()) {
      function(qkv, &at, q, k, v, *factors);
    } else {
      function(qkv, &at, q, k, v, int64_t{1});
    }
  }
  /*! \brief Whether keys turn as they do when they are stored, or back to how they came. */
  enum class Turn { kForth, kBack };
  bool UndoesRotation();
  /*! \brief Keys [token, head, dim] rotated by the model's own function, in host memory. */
  Tensor RotateByModel(const std::vector<int32_t>& positions, const char* keys);
  Tensor MakeRopeTable(int32_t rotary_dim, bool interleaved);
  /*! \brief Keys [layer, token, head, dim] of a sequence's tokens from `start` on. */
  void TurnKeys(const Sequence& sequence, int64_t start, const Tensor& from, Tensor to, Turn turn);
  void AllocateTwins();
  void CheckParts(const char* what) const;

  template <typename Copy>
  void ForEachRow(int64_t seq_id, int64_t start, int64_t end, const Copy& copy);
  template <typename Copy>
  void ForEachLatentRow(int64_t seq_id, int64_t start, int64_t end, const Tensor& kv_data,
                        const Copy& copy);
  void CheckRange(int64_t seq_id, int64_t start, int64_t end) const;
  void CheckDebugTensors(const Tensor& k, const Tensor& v, int64_t length) const;

  tvm::ffi::json::Object LayoutMetadata() const;
  const Sequence* CheckpointSequence(int64_t seq_id, const char* what) const;
  int64_t LogicalPages(const Sequence& sequence) const;
  /*! \brief Of one layer's page group. */
  Shape GroupShape(int64_t pages) const;
  void CheckGroup(const Sequence& sequence, int64_t group_id, const Tensor& group) const;
  template <typename Copy>
  void ForEachGroupRow(const Sequence& sequence, int64_t group_id, const Tensor& group,
                       const Copy& copy) const;
  Import* CheckImport(int64_t seq_id, const char* what);
  void CheckImported(int64_t seq_id, const char* what) const;

  KVCacheConfig config_;
  KernelHandle kernel_;
  DLDataType dtype_;
  DLDevice device_;
  int32_t element_bytes_;
  bool rotates_;  //!< new queries and keys, before they are stored
  KVStrides k_strides_, v_strides_;
  int64_t k_page_, v_page_;  //!< elements of a page's keys and of its values
  std::vector<LayerPool> layers_;
  PageTable pages_;

  std::optional<SplitRotary> split_rotary_;
  bool inline_rope_ = false;
  Tensor rope_table_{nullptr};              //!< of kernels that rotate keys
  Tensor rotated_q_, rotated_k_, split_v_;  //!< [max_q_tokens, heads, dim], of split_rotary_

  std::optional<Import> import_;
  std::optional<tvm::ffi::Function> transfer_;
  std::unordered_map<int64_t, Send> sends_;  //!< by sequence
  std::vector<StepSend> step_sends_;

  // The step between begin_forward and end_forward.
  bool in_forward_ = false;
  int64_t step_ = 0;  //!< counts begin_forward
  std::vector<AppendRequest> requests_;
  std::vector<TokenTree> trees_;  //!< of the requests, if the step has token trees
  std::vector<int32_t> page_indptr_, page_ids_;
  std::vector<PageCopy> copies_;
  std::vector<LayerState> layer_states_;
  std::optional<RopeConfig> rope_config_;
  StepLayout layout_, past_layout_, own_layout_, masked_layout_;
  bool past_planned_ = false, own_planned_ = false, mask_planned_ = false;
  std::vector<uint8_t> mask_;  //!< that masked_layout_ was built of
  int32_t mask_window_ = 0;    //!< the same
  std::unique_ptr<StepRunner> runner_;
  std::vector<LayerGroup> groups_;
  std::vector<int32_t> group_of_;  //!< [layer] index of its group, or -1; empty: there are none
  BoundVariantArgs variant_, call_variant_;
  bool has_variant_ = false, variant_ignores_positions_ = false, variant_merges_ = false;
  //! Of attention in parts, and under a mask; made when they are asked for.
  std::unique_ptr<StepRunner> past_, own_, masked_;
  Tensor twin_o_, twin_lse_;  //!< of steps that attend every query twice
  std::optional<KernelHandle> self_kernel_;
  int32_t self_kv_heads_ = 0;
};

/*! \brief The cache that a packed function was given, which must be one of ours. */
KVCacheObj* Ours(const tvm::runtime::vm::AttentionKVCache& cache);

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_KV_CACHE_H_
