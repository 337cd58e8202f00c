// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The CPU path for few packed rows (decode): lanes are elements of the head.
//
// Every byte of K and V is read from memory once, in vectors, against all rows of the tile, so the
// path is bound by memory traffic. The next block is prefetched while one is computed, line by line
// in address order: the hardware's own prefetchers follow ascending lines only.
#ifndef TVM_FLASHINFER_CPU_FEW_ROWS_H_
#define TVM_FLASHINFER_CPU_FEW_ROWS_H_

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "row_transform.h"
#include "state_writer.h"
#include "tile.h"

namespace tvm_flashinfer {
namespace cpu {

/*! \tparam kRows Packed rows of the item, at most kMaxFewRows. */
template <typename TQ, typename TKV, int kDimQK, int kDimVO, typename Variant, int kRows>
class FewRows {
 public:
  static constexpr int kBlockKV = 32;

  static int64_t ScratchFloats() {
    return kRows * (kPaddedQK + kPaddedVO + kBlockKV) + kKeyFloats + kValueFloats;
  }

  static void Run(const AttentionParams& p, const WorkItem& item, float* scratch) {
    FewRows(p, item, scratch).Run();
  }

 private:
  using Params = typename Variant::Params;
  static constexpr int kPaddedQK = kPaddedDim<kDimQK>;
  static constexpr int kPaddedVO = kPaddedDim<kDimVO>;
  //! Accumulators that leave registers for operands.
  static constexpr int kAccumulators = kRegisters == 32 ? 16 : 8;
  //! Rows of one register block: more would leave it one token wide and starved for loads.
  static constexpr int kGroups = (kRows + 3) / 4;
  static constexpr int kGroupRows = (kRows + kGroups - 1) / kGroups;
  static constexpr int kTokens = kAccumulators / kGroupRows >= 8   ? 8
                                 : kAccumulators / kGroupRows >= 4 ? 4
                                                                   : 2;
  static constexpr int kVectors = kTokens;
  static constexpr int kUnit = kElementsPerUnit<TKV>;
  //! Elements of a cache line.
  static constexpr int kLine = 64 / static_cast<int>(sizeof(TKV)) * kUnit;
  //! Transformed rows are float32, in a block of scratch; others are read in their pages.
  static constexpr bool kKeys = Variant::kHasKey, kValues = Variant::kHasValue;
  using Key = std::conditional_t<kKeys, float, TKV>;
  using Value = std::conditional_t<kValues, float, TKV>;
  static constexpr int kKeyFloats = kKeys ? (kBlockKV + 1) * kPaddedQK : 0;
  static constexpr int kValueFloats = kValues ? (kBlockKV + 1) * kPaddedVO : 0;
  static_assert(kBlockKV % kTokens == 0 && kBlockKV % kLanes == 0, "blocks hold whole vectors");

  FewRows(const AttentionParams& p, const WorkItem& item, float* scratch)
      : p_(p),
        item_(item),
        rows_(p, item),
        variant_(*static_cast<const Params*>(p.variant_params)),
        q_(scratch),
        o_(q_ + kRows * kPaddedQK),
        s_(o_ + kRows * kPaddedVO),
        key_block_(s_ + kRows * kBlockKV),
        value_block_(key_block_ + kKeyFloats) {}

  void Run() {
    LoadQueries();
    TileRange range;
    QueryRange(p_, item_, &range);
    const KVRows<TKV> k_rows(p_.k, p_.k_strides, p_, item_);
    const KVRows<TKV> v_rows(p_.v, p_.v_strides, p_, item_);
    const int32_t position = p_.plan.KVPosition(item_.level, item_.row);
    const int32_t end = item_.kv_begin + item_.kv_count;
    const TKV* rows[2][2][kBlockKV];  // [this or next block][k or v]
    auto gather = [&](int32_t begin, const TKV*(&block)[2][kBlockKV]) {
      const int32_t count = std::min<int32_t>(kBlockKV, end - begin);
      if (count <= 0) return count;
      k_rows.Gather(begin, count, block[0]);
      v_rows.Gather(begin, count, block[1]);
      // Rows past the end repeat the last one: their logits are masked.
      for (int32_t i = count; i < kBlockKV; ++i) {
        block[0][i] = block[0][count - 1];
        block[1][i] = block[1][count - 1];
      }
      return count;
    };
    int parity = 0;
    int32_t count = gather(item_.kv_begin, rows[0]);
    for (int32_t begin = item_.kv_begin; begin < end; begin += kBlockKV, parity ^= 1) {
      const int32_t next_count = gather(begin + kBlockKV, rows[parity ^ 1]);
      const auto& now = rows[parity];
      const auto& next = next_count > 0 ? rows[parity ^ 1] : rows[parity];
      range.kv_lo = position + begin;
      range.kv_hi = range.kv_lo + count - 1;
      const TileClass tile = Variant::Classify(variant_, range);
      if (tile != TileClass::kEmpty) {
        int32_t slots[kBlockKV];
        if constexpr (kKeys || kValues) k_rows.Slots(begin, count, slots);
        if constexpr (kKeys) {
          const float* rows[kBlockKV];
          TransformRows<kDimQK>(
              now[0], next[0], count, range.kv_lo, slots,
              [this](const auto& x, const auto& at) {
                return Variant::template Key<SimdLanes>(variant_, x, at);
              },
              key_block_, rows);
          Scores(rows, next[0]);
        } else {
          Scores(now[0], next[0]);
        }
        Transform(range.kv_lo, count, tile == TileClass::kMixed);
        float rescale[kRows];
        Softmax(rescale);
        if constexpr (kValues) {
          const float* rows[kBlockKV];
          TransformRows<kDimVO>(
              now[1], next[1], count, range.kv_lo, slots,
              [this](const auto& x, const auto& at) {
                return Variant::template Value<SimdLanes>(variant_, x, at);
              },
              value_block_, rows);
          Accumulate(rows, next[1], count, rescale);
        } else {
          Accumulate(now[1], next[1], count, rescale);
        }
      }
      count = next_count;
    }
    WriteStates();
  }

  void LoadQueries() {
    const TQ* q = static_cast<const TQ*>(p_.q);
    for (int r = 0; r < kRows; ++r) {
      const TQ* from = q + rows_.Token(r) * p_.q_token_stride + rows_.Head(r) * p_.q_head_stride;
      float* to = q_ + r * kPaddedQK;
      if constexpr (Variant::kHasQuery) {
        const int32_t token = rows_.Token(r);
        const RowIndex at{p_.plan.q_request[token],
                          p_.plan.q_position[token],
                          rows_.Head(r),
                          item_.head,
                          token,
                          {}};
        float buffer[2 * kPaddedQK];
        const float* row = QueryRow<kDimQK, Variant>(from, variant_, at, buffer);
        for (int d = 0; d < kPaddedQK; ++d) to[d] = row[d] * p_.sm_scale;
      } else {
        for (int d = 0; d < kDimQK; ++d) to[d] = ToFloat(from[d]) * p_.sm_scale;
        for (int d = kDimQK; d < kPaddedQK; ++d) to[d] = 0.0f;
      }
      max_[r] = Variant::kSoftmax ? -kInf : 0.0f;
      sum_[r] = 0.0f;
    }
    std::fill_n(o_, kRows * kPaddedVO, 0.0f);
  }

  /*! Rows of the block transformed into `block`, which `rows` point into; prefetches the next. */
  template <int kDim, typename Fn>
  void TransformRows(const TKV* const* source, const TKV* const* next, int32_t count,
                     int32_t position, const int32_t* slots, const Fn& transform, float* block,
                     const float** rows) {
    constexpr int kRowLines = (kDim + kLine - 1) / kLine;
    for (int line = 0; line < kRowLines * count; ++line) PrefetchLine<kDim>(next, line);
    const RowIndex at{0, position, 0, item_.head, 0, {}};
    TransformBlock<kDim>(source, count, at, slots, transform, block, rows);
    for (int32_t i = count; i < kBlockKV; ++i) rows[i] = rows[count - 1];
  }

  /*! Prefetch the `line`-th cache line of a block, counted row after row. */
  template <int kDim>
  static void PrefetchLine(const TKV* const* rows, int line) {
    constexpr int kRowLines = (kDim + kLine - 1) / kLine;
    Prefetch(rows[line / kRowLines] + line % kRowLines * (kLine / kUnit));
  }

  /*! S[row][n] = Q[row] . K[n] */
  void Scores(const Key* const* k, const TKV* const* next) {
    for (int n = 0; n < kBlockKV; n += kTokens) {
      ScoreRows<0, kGroupRows>(k, next, n);
      if constexpr (kGroups > 1) ScoreRows<kGroupRows, kRows - kGroupRows>(k, next, n);
    }
  }

  template <int kFirst, int kCount>
  void ScoreRows(const Key* const* k, const TKV* const* next, int n) {
    VFloat acc[kTokens][kCount] = {};
#pragma GCC unroll 4
    for (int d = 0; d < kPaddedQK; d += kLanes) {
      if (!kKeys && kFirst == 0 && d % kLine == 0) {
        for (int t = 0; t < kTokens; ++t) {
          PrefetchLine<kDimQK>(next + n, d / kLine * kTokens + t);
        }
      }
      VFloat key[kTokens];
      for (int t = 0; t < kTokens; ++t) key[t] = LoadRow<kDimQK>(k[n + t], d);
      for (int r = 0; r < kCount; ++r) {
        const VFloat query = Load(q_ + (kFirst + r) * kPaddedQK + d);
        for (int t = 0; t < kTokens; ++t) acc[t][r] += key[t] * query;
      }
    }
    for (int r = 0; r < kCount; ++r) {
      float* s = s_ + (kFirst + r) * kBlockKV + n;
      for (int t = 0; t < kTokens; ++t) s[t] = ReduceAdd(acc[t][r]);
    }
  }

  void Transform(int32_t kv_position, int32_t count, bool masked) {
    if (!Variant::kHasLogits && !masked && count == kBlockKV) return;
    for (int r = 0; r < kRows; ++r) {
      ElementIndex<VInt> at;
      at.request = Broadcast(p_.plan.q_request[rows_.Token(r)]);
      at.q_idx = Broadcast(p_.plan.q_position[rows_.Token(r)]);
      at.q_head = Broadcast(rows_.Head(r));
      at.kv_head = Broadcast(item_.head);
      for (int n = 0; n < kBlockKV; n += kLanes) {
        const VInt index = Iota() + n;
        // Lanes past the end repeat the last key: a variant may index a tensor with it.
        at.kv_idx = SimdLanes::Min(index, Broadcast(count - 1)) + kv_position;
        VInt visible = index < count;
        float* s = s_ + r * kBlockKV + n;
        VFloat x = Load(s);
        if constexpr (Variant::kHasLogits) {
          x = Variant::template Logits<SimdLanes>(variant_, x, at);
        }
        if (masked) visible = visible & Variant::template Mask<SimdLanes>(variant_, at);
        Store(s, Select(visible, x, Broadcast(Variant::kSoftmax ? -kInf : 0.0f)));
      }
    }
  }

  void Softmax(float* rescale) {
    if constexpr (!Variant::kSoftmax) {
      std::fill_n(rescale, kRows, 1.0f);
      return;
    }
    for (int r = 0; r < kRows; ++r) {
      float* s = s_ + r * kBlockKV;
      VFloat lanes_max = Load(s);
      for (int n = kLanes; n < kBlockKV; n += kLanes) lanes_max = Max(lanes_max, Load(s + n));
      const float max = std::max(max_[r], ReduceMax(lanes_max));
      const float safe = max == -kInf ? 0.0f : max;
      rescale[r] = std::exp(max_[r] - safe);
      VFloat sum = {};
      for (int n = 0; n < kBlockKV; n += kLanes) {
        const VFloat e = Exp(Load(s + n) - safe);
        sum += e;
        Store(s + n, e);
      }
      max_[r] = max;
      sum_[r] = sum_[r] * rescale[r] + ReduceAdd(sum);
    }
  }

  /*! O[row] = O[row] * rescale + P[row] V, a few vectors of the head at a time. */
  void Accumulate(const Value* const* v, const TKV* const* next, int32_t count,
                  const float* rescale) {
    constexpr int kStep = kVectors * kLanes;
    int d = 0;
    for (; d + kStep <= kPaddedVO; d += kStep) {
      AccumulateVectors<kVectors>(v, next, count, d, rescale);
    }
    constexpr int kTail = kPaddedVO / kLanes % kVectors;
    if constexpr (kTail > 0) AccumulateVectors<kTail>(v, next, count, d, rescale);
  }

  template <int kWidth>
  void AccumulateVectors(const Value* const* v, const TKV* const* next, int32_t count, int d,
                         const float* rescale) {
    AccumulateRows<0, kGroupRows, kWidth>(v, next, count, d, rescale);
    if constexpr (kGroups > 1) {
      AccumulateRows<kGroupRows, kRows - kGroupRows, kWidth>(v, next, count, d, rescale);
    }
  }

  template <int kFirst, int kCount, int kWidth>
  void AccumulateRows(const Value* const* v, const TKV* const* next, int32_t count, int d,
                      const float* rescale) {
    constexpr int kLines = (kWidth * kLanes + kLine - 1) / kLine;
    float* o = o_ + kFirst * kPaddedVO + d;
    const float* s = s_ + kFirst * kBlockKV;
    VFloat acc[kCount][kWidth];
    for (int r = 0; r < kCount; ++r) {
      for (int j = 0; j < kWidth; ++j) {
        acc[r][j] = Load(o + r * kPaddedVO + j * kLanes) * rescale[kFirst + r];
      }
    }
    for (int32_t n = 0; n < count; ++n) {
      if (!kValues && kFirst == 0 && d % kLine == 0) {
        const int line = d / kLine * count + n * kLines;
        for (int i = 0; i < kLines; ++i) PrefetchLine<kDimVO>(next, line + i);
      }
      VFloat value[kWidth];
      for (int j = 0; j < kWidth; ++j) value[j] = LoadRow<kDimVO>(v[n], d + j * kLanes);
      for (int r = 0; r < kCount; ++r) {
        const VFloat weight = Broadcast(s[r * kBlockKV + n]);
        for (int j = 0; j < kWidth; ++j) acc[r][j] += weight * value[j];
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int j = 0; j < kWidth; ++j) Store(o + r * kPaddedVO + j * kLanes, acc[r][j]);
    }
  }

  void WriteStates() {
    const StateWriter<Variant, TQ, kDimVO> writer(p_, item_);
    for (int r = 0; r < kRows; ++r) {
      const float* o = o_ + r * kPaddedVO;
      writer.Write(r, max_[r], sum_[r], [o](int d) { return o[d]; });
    }
  }

  const AttentionParams& p_;
  const WorkItem& item_;
  PackedRows rows_;
  const Params& variant_;
  float *q_, *o_, *s_, *key_block_, *value_block_;
  float max_[kRows], sum_[kRows];
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_FEW_ROWS_H_
