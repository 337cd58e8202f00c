// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The CPU attention template: one instantiation gives one kernel table.
#ifndef TVM_FLASHINFER_CPU_ATTENTION_H_
#define TVM_FLASHINFER_CPU_ATTENTION_H_

#include <algorithm>
#include <type_traits>

#include "../interval.h"
#include "../state.h"
#include "few_rows.h"
#include "kernel.h"
#include "many_rows.h"
#include "many_rows_amx.h"
#include "row_transform.h"
#include "state_writer.h"

namespace tvm_flashinfer {
namespace cpu {

/*!
 * \brief The attention template on a CPU.
 * \tparam TQ Queries and outputs: float, Float16 or BFloat16. Arithmetic is float32.
 * \tparam TKV The KV pool's elements: those, or Float8E4M3, Float8E5M2, Int8, Int4.
 * \tparam Variant See variant.h.
 */
template <typename TQ, typename TKV, int kDimQK, int kDimVO, typename Variant>
struct Attention {
  //! Up to here vectors along the head waste fewer lanes than vectors along rows.
  static constexpr int kMaxFewRows = std::min(8, kLanes);
  static constexpr int kPrefillRows = 128;
  using Few = FewRows<TQ, TKV, kDimQK, kDimVO, Variant, kMaxFewRows>;
  using Many = ManyRows<TQ, TKV, kDimQK, kDimVO, Variant>;
#ifdef TVM_FLASHINFER_AMX
  //! Tiles multiply bfloat16: queries of that type lose nothing.
  static constexpr bool kAmx = std::is_same_v<TQ, BFloat16>;
  using Amx = ManyRowsAmx<TKV, kDimQK, kDimVO, Variant>;
#endif

  static int32_t OutOfBoundsParam(const VariantArgs* args, const VisitedRange* at) {
    if constexpr (std::is_same_v<typename Variant::Params, VariantArgs>) {
      return FindOutOfBoundsParam<Variant, kDimQK, kDimVO>(*args, *at);
    }
    return -1;
  }

  static int64_t ScratchBytes(int32_t max_rows) {
    const int64_t few = Few::ScratchFloats();
    int64_t floats = std::max(few, Many::ScratchFloats(max_rows));
#ifdef TVM_FLASHINFER_AMX
    if constexpr (kAmx) floats = std::max(floats, Amx::ScratchFloats(max_rows));
#endif
    return floats * static_cast<int64_t>(sizeof(float));
  }

  static void RunItems(const AttentionParams* p, const WorkItem* items, int32_t count,
                       void* scratch) {
    const int32_t rows = items->q_count * (p->num_qo_heads / p->num_kv_heads);
    RunRows<1>(rows, *p, items, count, static_cast<float*>(scratch));
  }

  static void Merge(const AttentionParams* p, int32_t begin, int32_t end) {
    struct State {
      const float* o;
      float max, sum;
    };
    const int32_t heads = p->num_qo_heads;
    float o[kDimVO];
    for (int32_t token = begin; token < end; ++token) {
      const int32_t* rows = p->plan.merge_rows + p->plan.merge_indptr[token];
      const int32_t count = p->plan.merge_indptr[token + 1] - p->plan.merge_indptr[token];
      if (count == 0) continue;
      for (int32_t head = 0; head < heads; ++head) {
        float max, sum;
        MergePartialStates(
            count,
            [&](int32_t i) {
              const int64_t at = int64_t{rows[i]} * heads + head;
              const float* softmax = p->softmax_partial + 2 * at;
              return State{p->o_partial + at * kDimVO, softmax[0], softmax[1]};
            },
            kDimVO, o, &max, &sum);
        FinishState<Variant, TQ, kDimVO>(*p, token, head, max, sum, [&](int d) { return o[d]; });
      }
    }
  }

  static void Append(const AppendParams* p, int32_t begin, int32_t end) {
    if (p->values) {
      const auto store = [&](const auto& x, const auto& at) {
        if constexpr (Variant::kHasStoreValue) {
          const auto& variant = *static_cast<const typename Variant::Params*>(p->variant_params);
          return Variant::template StoreValue<SimdLanes>(variant, x, at);
        } else {
          return SimdLanes::Element(x);
        }
      };
      AppendRows<kDimVO, Variant::kHasStoreValue>(*p, begin, end, store);
    } else {
      const auto store = [&](const auto& x, const auto& at) {
        if constexpr (Variant::kHasStoreKey) {
          const auto& variant = *static_cast<const typename Variant::Params*>(p->variant_params);
          return Variant::template StoreKey<SimdLanes>(variant, x, at);
        } else {
          return SimdLanes::Element(x);
        }
      };
      AppendRows<kDimQK, Variant::kHasStoreKey>(*p, begin, end, store);
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
                                    Variant::kSoftmax,
                                    Variant::kHasStoreKey || Variant::kHasStoreValue,
                                    {kMaxFewRows, kPrefillRows},
                                    Many::kBlockKV,
                                    &OutOfBoundsParam,
                                    Few::kMaxHeads,
                                    &ScratchBytes,
                                    &RunItems,
                                    &Merge,
                                    &Append};
    return &table;
  }

 private:
  template <int kDim, bool kTransform, typename Store>
  static void AppendRows(const AppendParams& p, int32_t begin, int32_t end, const Store& store) {
    for (int32_t token = begin; token < end; ++token) {
      const int64_t slot = p.slots[token];
      if (slot < 0) continue;
      const TQ* from = static_cast<const TQ*>(p.source) + token * p.source_token_stride;
      TKV* to = static_cast<TKV*>(p.pool) + slot / p.page_size * p.strides.page +
                slot % p.page_size * p.strides.token;
      for (int32_t head = 0; head < p.num_heads; ++head) {
        const TQ* source = from + head * p.source_head_stride;
        TKV* target = to + head * p.strides.head;
        if constexpr (std::is_same_v<TQ, TKV> && !kTransform) {
          std::memcpy(target, source, kDim * sizeof(TKV));
        } else {
          float row[2 * kPaddedDim<kDim>];
          RowToFloat<kDim>(source, row);
          if constexpr (kTransform) {
            const RowIndex at{0,
                              p.positions == nullptr ? 0 : p.positions[token],
                              0,
                              head,
                              static_cast<int32_t>(slot),
                              {}};
            TransformRow<kDim>(row, at, store, row + kPaddedDim<kDim>);
          }
          StoreRow(row + (kTransform ? kPaddedDim<kDim> : 0), kDim, target);
        }
      }
    }
  }

  template <int kRows>
  static void RunRows(int32_t rows, const AttentionParams& p, const WorkItem* items, int32_t count,
                      float* scratch) {
    if (rows == kRows) {
      FewRows<TQ, TKV, kDimQK, kDimVO, Variant, kRows>::Run(p, items, count, scratch);
    } else if constexpr (kRows < kMaxFewRows) {
      RunRows<kRows + 1>(rows, p, items, count, scratch);
    } else {
      for (int32_t i = 0; i < count; ++i) RunManyRows(p, items[i], scratch);
    }
  }

  static void RunManyRows(const AttentionParams& p, const WorkItem& item, float* scratch) {
#ifdef TVM_FLASHINFER_AMX
    if constexpr (kAmx) {
      if (amx::Available()) return Amx::Run(p, item, scratch);
    }
#endif
    Many::Run(p, item, scratch);
  }
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_ATTENTION_H_
