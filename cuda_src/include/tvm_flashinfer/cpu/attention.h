// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The CPU attention template: one instantiation gives one kernel table.
#ifndef TVM_FLASHINFER_CPU_ATTENTION_H_
#define TVM_FLASHINFER_CPU_ATTENTION_H_

#include <type_traits>

#include "../interval.h"
#include "../state.h"
#include "few_rows.h"
#include "kernel.h"
#include "many_rows.h"

namespace tvm_flashinfer {
namespace cpu {

template <typename T>
constexpr ElementType ElementTypeOf() {
  if constexpr (std::is_same_v<T, float>) return ElementType::kFloat32;
  if constexpr (std::is_same_v<T, Float16>) return ElementType::kFloat16;
  if constexpr (std::is_same_v<T, BFloat16>) return ElementType::kBFloat16;
}

/*!
 * \brief The attention template on a CPU.
 * \tparam TQ Queries and outputs: float, Float16 or BFloat16. Arithmetic is float32.
 * \tparam TKV The KV pool's elements.
 * \tparam Variant See variant.h.
 */
template <typename TQ, typename TKV, int kDimQK, int kDimVO, typename Variant>
struct Attention {
  //! Up to here vectors along the head waste fewer lanes than vectors along rows.
  static constexpr int kMaxFewRows = 8;
  static constexpr int kPrefillRows = 128;
  using Many = ManyRows<TQ, TKV, kDimQK, kDimVO, Variant>;

  static int32_t OutOfBoundsParam(const VariantArgs* args, const ElementIndex<Interval>* at) {
    if constexpr (std::is_same_v<typename Variant::Params, VariantArgs>) {
      return FindOutOfBoundsParam<Variant>(*args, *at);
    }
    return -1;
  }

  static int64_t ScratchBytes(int32_t max_rows) {
    const int64_t few = FewRows<TQ, TKV, kDimQK, kDimVO, Variant, kMaxFewRows>::ScratchFloats();
    const int64_t many = Many::ScratchFloats(max_rows);
    return (few > many ? few : many) * static_cast<int64_t>(sizeof(float));
  }

  static void RunItem(const AttentionParams* p, const WorkItem* item, void* scratch) {
    const int32_t rows = item->q_count * (p->num_qo_heads / p->num_kv_heads);
    RunRows<1>(rows, *p, *item, static_cast<float*>(scratch));
  }

  static void Merge(const AttentionParams* p, int32_t begin, int32_t end) {
    struct State {
      const float* o;
      float lse;
    };
    const int32_t heads = p->num_qo_heads;
    float o[kDimVO];
    for (int32_t token = begin; token < end; ++token) {
      const int32_t* rows = p->plan.merge_rows + p->plan.merge_indptr[token];
      const int32_t count = p->plan.merge_indptr[token + 1] - p->plan.merge_indptr[token];
      if (count == 0) continue;
      for (int32_t head = 0; head < heads; ++head) {
        float lse;
        MergeStates(
            count,
            [&](int32_t i) {
              const int64_t at = int64_t{rows[i]} * heads + head;
              return State{p->o_partial + at * kDimVO, p->lse_partial[at]};
            },
            kDimVO, o, &lse);
        TQ* to = static_cast<TQ*>(p->o) + token * p->o_token_stride + head * p->o_head_stride;
        for (int d = 0; d < kDimVO; ++d) to[d] = FromFloat<TQ>(o[d]);
        if (p->lse != nullptr) p->lse[int64_t{token} * heads + head] = lse;
      }
    }
  }

  static void Append(const AppendParams* p, int32_t begin, int32_t end) {
    for (int32_t token = begin; token < end; ++token) {
      const int64_t slot = p->slots[token];
      if (slot < 0) continue;
      const TQ* from = static_cast<const TQ*>(p->source) + token * p->source_token_stride;
      TKV* to = static_cast<TKV*>(p->pool) + slot / p->page_size * p->strides.page +
                slot % p->page_size * p->strides.token;
      for (int32_t head = 0; head < p->num_heads; ++head) {
        const TQ* source = from + head * p->source_head_stride;
        TKV* target = to + head * p->strides.head;
        if constexpr (std::is_same_v<TQ, TKV>) {
          std::memcpy(target, source, p->dim * sizeof(TKV));
        } else {
          for (int32_t d = 0; d < p->dim; ++d) target[d] = FromFloat<TKV>(ToFloat(source[d]));
        }
      }
    }
  }

  /*!
   * \param causal Whether Variant hides every key after its query.
   * \param params, num_params What Variant declares; they outlive the table.
   */
  static const CpuKernel* Table(bool causal, const VariantParam* params = nullptr,
                                int32_t num_params = 0) {
    static const CpuKernel table = {kCpuKernelAbi,
                                    ElementTypeOf<TQ>(),
                                    ElementTypeOf<TKV>(),
                                    kDimQK,
                                    kDimVO,
                                    num_params,
                                    params,
                                    causal,
                                    {kMaxFewRows, kPrefillRows},
                                    Many::kBlockKV,
                                    &OutOfBoundsParam,
                                    &ScratchBytes,
                                    &RunItem,
                                    &Merge,
                                    &Append};
    return &table;
  }

 private:
  template <int kRows>
  static void RunRows(int32_t rows, const AttentionParams& p, const WorkItem& item,
                      float* scratch) {
    if (rows == kRows) {
      FewRows<TQ, TKV, kDimQK, kDimVO, Variant, kRows>::Run(p, item, scratch);
    } else if constexpr (kRows < kMaxFewRows) {
      RunRows<kRows + 1>(rows, p, item, scratch);
    } else {
      Many::Run(p, item, scratch);
    }
  }
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_ATTENTION_H_
