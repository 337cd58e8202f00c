// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Plans the steps of a KV cache and runs their layers, where the cache lives.
#ifndef TVM_FLASHINFER_RUNTIME_STEP_RUNNER_H_
#define TVM_FLASHINFER_RUNTIME_STEP_RUNNER_H_

#include <tvm/runtime/tensor.h>
#include <tvm_flashinfer/compose.h>
#include <tvm_flashinfer/params.h>
#include <tvm_flashinfer/variant.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>

#include "kernel_handle.h"
#include "kv_cache_config.h"
#include "rope.h"
#include "step_layout.h"
#include "step_plan.h"
#include "token_heads.h"

namespace tvm_flashinfer {

/*! \brief Keys and values of one layer. */
struct PoolView {
  char* k;
  char* v;
  KVStrides k_strides, v_strides;
};

/*! \brief Two states of the same queries, dense, and where the merged one goes; it may be `a`. */
struct MergeOperands {
  const void *o_a, *o_b;  //!< [token, head, dim], element type of the queries
  const float *lse_a, *lse_b;
  TokenHeads o;
  float* lse;
  int32_t num_tokens, num_heads, dim;
};

class StepRunner {
 public:
  virtual ~StepRunner() = default;

  /*! \brief The runner of a kernel's backend. */
  static std::unique_ptr<StepRunner> Make(const KVCacheConfig& config, KernelHandle kernel,
                                          DLDevice device, std::optional<RopeConfig> rope);

  /*! \brief Plan a step. A throw changes nothing. */
  virtual void Plan(StepLayout* layout) = 0;
  /*! \brief The step that was planned begins. */
  virtual void Begin(const StepLayout& layout) = 0;
  /*! \brief Positions of the step's tokens, int32 [max_q_tokens] on the device. */
  virtual tvm::runtime::Tensor Positions() const = 0;
  /*! \brief The same of StepLayout::origins: positions that queries and keys are rotated by. */
  virtual tvm::runtime::Tensor Origins() const = 0;
  /*!
   * \brief Rotate the step's queries and keys, if the cache rotates, and store keys and values.
   * \param num_tokens Of the operands: what follows the step's tokens is padding, stored nowhere.
   */
  virtual void Append(const PoolView& pool, TokenHeads* q, TokenHeads k, TokenHeads v,
                      int32_t num_tokens) = 0;
  /*! \brief Attention of one layer; fills in what the plan and the workspace decide. */
  virtual void Attend(AttentionParams* params) = 0;
  /*! \brief Copy to or from the device's memory, in the order of the other calls. */
  virtual void Copy(void* to, const void* from, int64_t bytes) = 0;
  /*! \brief Wait until what was called is done: its operands are the caller's again. */
  virtual void Wait() = 0;
  /*! \brief Merge attention states, in the order of the other calls. */
  virtual void Merge(const MergeOperands& m) = 0;
  /*! \brief A query sees `window` tokens, itself included: so masks the kernel's variant. */
  void UseWindow(int32_t window) {
    window_ = window;
    variant_args_.arg[0].i = window - 1;
    has_variant_ = kernel_->num_params == 1;
  }
  /*! \brief Keys are stored as they come: the kernel rotates them. */
  void RotateQueriesOnly() { rotates_keys_ = false; }
  /*! \brief Parameters of the kernel's variant; what they point at outlives the runner. */
  void UseVariant(const VariantArgs& args) {
    variant_args_ = args;
    has_variant_ = true;
  }
  /*! \brief Whether the kernel's variant has the parameters that it declares. */
  bool has_variant() const { return has_variant_ || kernel_->num_params == 0; }
  int32_t window() const { return window_; }
  /*! \brief Parameters of the kernel's variant. */
  const VariantArgs* variant_args() const { return &variant_args_; }
  /*! \brief See KVCacheObj::GraphKey. */
  virtual int64_t GraphKey() const = 0;
  /*! \brief Who decides which prefixes a step shares. */
  void UseFormat(FormatChoice choice) { format_.Use(choice); }
  /*!
   * \brief Fill with NaN what a run may write before it reads it, to show that nothing of it is
   * read; for tests of captured steps.
   */
  virtual void PoisonWorkspace();
  /*! \brief The plan that was made last, on the host; sections as bounds lay them out. */
  virtual PlanOnHost LastPlan() const = 0;

 protected:
  StepRunner(const KVCacheConfig& config, KernelHandle kernel)
      : config_(config),
        kernel_(std::move(kernel)),
        // A slid window over rotated keys puts every query there twice.
        format_(PageBounds(), config.sliding_window ? 2 * config.max_batch : config.max_batch) {
    format_.Use(config.format);
  }

  int32_t group() const { return config_.num_qo_heads / config_.num_kv_heads; }

  /*! \brief Bounds of steps that attend whole sequences. */
  PlanBounds PageBounds() const {
    PlanBounds b;
    b.max_requests = config_.max_batch;
    b.max_q_tokens = config_.max_q_tokens();
    // Sequences that share pages each list them: any one may span the whole pool.
    b.max_kv_pages = static_cast<int32_t>(
        std::min<int64_t>(int64_t{config_.max_batch} * config_.num_pages(), INT32_MAX / 2));
    b.max_prefix_levels = kPrefixLevels;
    b.max_prefix_q_tokens = std::min(b.max_q_tokens, config_.max_batch * kSharingTokens);
    b.max_levels = 1 + b.max_prefix_levels;
    b.num_kv_heads = config_.num_kv_heads;
    b.max_tile_tokens = std::max(1, kernel_->row_tiles[1] / group());
    return b;
  }

  /*! \brief Bounds of steps whose layout is by token. */
  PlanBounds TokenBounds(int64_t num_blocks) const {
    PlanBounds b = PageBounds();
    ++b.max_levels;                                               // the nodes of trees
    b.max_requests = config_.max_batch + config_.max_q_tokens();  // a row for each node of a tree
    if (config_.sliding_window) {                                 // every query may be there twice
      b.max_requests += config_.max_batch;
      b.max_q_tokens *= 2;
    }
    b.max_kv_pages = 4096;
    while (b.max_kv_pages < num_blocks) b.max_kv_pages *= 2;
    return b;
  }

  /*! \brief What the scheduler is told, whatever the backend. */
  ScheduleInput Describe(StepLayout* layout) const {
    ScheduleInput in;
    layout->Describe(&in);
    in.causal = kernel_->causal != 0;
    in.group = group();
    in.kv_align = kernel_->kv_align;
    if (window_ > 0) in.window_left = window_ - 1;
    return in;
  }

  //! Prefixes within prefixes that a step shares: every one more costs a state of every query.
  static constexpr int32_t kPrefixLevels = 4;
  //! Queries of a sequence, on average, in a step that shares prefixes: drafts have a few.
  static constexpr int32_t kSharingTokens = 4;

  KVCacheConfig config_;
  KernelHandle kernel_;
  FormatChooser format_;
  int32_t window_ = 0;
  bool rotates_keys_ = true;  //!< if the cache rotates
  VariantArgs variant_args_{};
  bool has_variant_ = false;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_STEP_RUNNER_H_
