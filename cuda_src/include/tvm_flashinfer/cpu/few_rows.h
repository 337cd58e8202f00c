// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The CPU path for few packed rows (decode): lanes are elements of the head.
//
// Decoding moves bytes, so the path is arranged by where they lie. Several KV heads of a chunk are
// computed together: the keys of all of them, then their values, a block of tokens at a time. A
// page is then read from its start to its end, which the hardware's prefetchers follow, rather than
// a few kilobytes here and there.
#ifndef TVM_FLASHINFER_CPU_FEW_ROWS_H_
#define TVM_FLASHINFER_CPU_FEW_ROWS_H_

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "row_prefetch.h"
#include "row_transform.h"
#include "state_writer.h"
#include "tile.h"

namespace tvm_flashinfer {
namespace cpu {

/*! \tparam kRows Packed rows of an item, at most kLanes. */
template <typename TQ, typename TKV, int kDimQK, int kDimVO, typename Variant, int kRows>
class FewRows {
 public:
  static constexpr int kBlockKV = 16;
  //! KV heads computed together: as many as leave two blocks of keys and values in L2.
  static constexpr int kMaxHeads = [] {
    constexpr int kBlockBytes = 256 << 10;
    const int head = kBlockKV * (kDimQK + kDimVO) * static_cast<int>(sizeof(TKV));
    return std::max(1, std::min(8, kBlockBytes / head));
  }();

  static int64_t ScratchFloats() { return kMaxHeads * kHeadFloats + kKeyFloats + kValueFloats; }

  /*! \param items `heads` items that differ in their head only, by one from each to the next. */
  static void Run(const AttentionParams& p, const WorkItem* items, int32_t heads, float* scratch) {
    FewRows(p, items, heads, scratch).Run();
  }

 private:
  using Params = typename Variant::Params;
  static constexpr int kPaddedQK = kPaddedDim<kDimQK>;
  static constexpr int kPaddedVO = kPaddedDim<kDimVO>;
  //! A vector of logits holds kPackTokens tokens of each of kPackRows rows, [row][token].
  static constexpr int kPackRows = kRows <= 1 ? 1 : kRows <= 2 ? 2 : kRows <= 4 ? 4 : 8;
  static constexpr int kPackTokens = kLanes / kPackRows;
  static_assert(kPackRows <= kLanes && kBlockKV % kPackTokens == 0, "logits are whole vectors");
  static constexpr int kPacks = kBlockKV / kPackTokens;
  //! Transformed rows are float32, in a block of scratch; others are read in their pages.
  static constexpr bool kKeys = Variant::kHasKey, kValues = Variant::kHasValue;
  using Key = std::conditional_t<kKeys, float, TKV>;
  using Value = std::conditional_t<kValues, float, TKV>;
  static constexpr int kKeyFloats = kKeys ? (kBlockKV + 1) * kPaddedQK : 0;
  static constexpr int kValueFloats = kValues ? (kBlockKV + 1) * kPaddedVO : 0;
  //! Products of bfloat16 pairs: of a query and a key, and of the weights of two tokens and their
  //! values, where nothing is lost but a weight's low bits.
  static constexpr bool kPairs =
      kBf16Dot && std::is_same_v<TQ, BFloat16> && std::is_same_v<TKV, BFloat16> && kPackTokens > 1;
  static constexpr int kPairLanes = 2 * kLanes;
  static constexpr bool kPairKeys =
      kPairs && !kKeys && !Variant::kHasQuery && kDimQK % kPairLanes == 0;
  static constexpr bool kPairValues = kPairs && !kValues && kDimVO % kPairLanes == 0;
  //! Of a head: queries, outputs, logits, and its vectors of maxima, sums and factors.
  static constexpr int kHeadFloats = kRows * (kPaddedQK + kPaddedVO) + (kPacks + 3) * kLanes;
  //! How many heads before its own a head's rows are prefetched.
  static constexpr int kAhead = 4;
  static constexpr int kLine = 64 / static_cast<int>(sizeof(TKV)) * kElementsPerUnit<TKV>;
  static constexpr int kLinesQK = KVRows<TKV>::template kLines<kDimQK>;
  static constexpr int kLinesVO = KVRows<TKV>::template kLines<kDimVO>;

  using Ahead = RowPrefetch<TKV, std::max(kLinesQK, kLinesVO)>;

  struct Head {
    float* q;                    //!< scaled; as they are, and bfloat16, if kPairKeys
    float* o;                    //!< not normalised; where an element is: OutputAt
    float* s;                    //!< logits, then weights: bfloat16 if kPairValues
    float *max, *sum, *rescale;  //!< [row][token of a pack]; maxima and factors equal in a row
  };

  FewRows(const AttentionParams& p, const WorkItem* items, int32_t heads, float* scratch)
      : p_(p),
        items_(items),
        heads_(heads),
        rows_(p, *items),
        variant_(*static_cast<const Params*>(p.variant_params)),
        k_rows_(p.k, p.k_strides, p, *items),
        v_rows_(p.v, p.v_strides, p, *items),
        scratch_(scratch),
        key_block_(scratch + kMaxHeads * kHeadFloats),
        value_block_(key_block_ + kKeyFloats) {}

  Head HeadAt(int32_t h) const {
    float* q = scratch_ + h * kHeadFloats;
    float* o = q + kRows * kPaddedQK;
    float* s = o + kRows * kPaddedVO;
    float* max = s + kPacks * kLanes;
    return {q, o, s, max, max + kLanes, max + 2 * kLanes};
  }

  void Run() {
    LoadQueries();
    const WorkItem& item = *items_;
    TileRange range;
    QueryRange(p_, item, &range);
    const int32_t position = p_.plan.KVPosition(item.level, item.row);
    const int32_t end = item.kv_begin + item.kv_count;
    Block blocks[2];
    Gather(item.kv_begin, end, &blocks[0]);
    int parity = 0;
    for (int32_t begin = item.kv_begin; begin < end; begin += kBlockKV, parity ^= 1) {
      const Block& block = blocks[parity];
      Block* next = &blocks[parity ^ 1];
      Gather(begin + kBlockKV, end, next);
      range.kv_lo = position + begin;
      range.kv_hi = range.kv_lo + block.count - 1;
      const TileClass tile = Variant::Classify(variant_, range);
      if (tile == TileClass::kEmpty) continue;
      int32_t slots[kBlockKV];
      if constexpr (kKeys || kValues) k_rows_.Slots(begin, block.count, slots);
      // Heads ahead of the last one are the first of what comes next: these values, the next keys.
      const auto keys_of = [&](const Block& of, int32_t h) {
        return Ahead{of.k, h * p_.k_strides.head};
      };
      const auto values_of = [&](const Block& of, int32_t h) {
        return Ahead{of.v, h * p_.v_strides.head};
      };
      const Block& after = next->count > 0 ? *next : block;
      const int32_t ahead_by = std::min(kAhead, heads_);
      for (int32_t h = 0; h < heads_; ++h) {
        const Head head = HeadAt(h);
        const int32_t later = h + ahead_by;
        const auto ahead =
            later < heads_ ? keys_of(block, later) : values_of(block, later - heads_);
        const Key* keys[kBlockKV];
        if constexpr (kKeys) {
          for (int i = 0; i < kBlockKV * kLinesQK; ++i) ahead.Line(i);
          TransformRows<kDimQK>(
              block.k, h * p_.k_strides.head, block.count, range.kv_lo, h, slots,
              [this](const auto& x, const auto& at) {
                return Variant::template Key<SimdLanes>(variant_, x, at);
              },
              key_block_, keys);
        } else {
          for (int n = 0; n < kBlockKV; ++n) keys[n] = block.k[n] + h * p_.k_strides.head;
        }
        for (int pack = 0; pack < kPacks; ++pack) {
          const int first = pack * kPackTokens;
          Store(head.s + pack * kLanes, Scores(head, keys + first, ahead.From(first)));
        }
        Transform(head, h, range.kv_lo, block.count, tile == TileClass::kMixed);
        Softmax(head);
      }
      for (int32_t h = 0; h < heads_; ++h) {
        const int32_t later = h + ahead_by;
        const auto ahead =
            later < heads_ ? values_of(block, later) : keys_of(after, later - heads_);
        const Value* values[kBlockKV];
        if constexpr (kValues) {
          for (int i = 0; i < kBlockKV * kLinesVO; ++i) ahead.Line(i);
          TransformRows<kDimVO>(
              block.v, h * p_.v_strides.head, block.count, range.kv_lo, h, slots,
              [this](const auto& x, const auto& at) {
                return Variant::template Value<SimdLanes>(variant_, x, at);
              },
              value_block_, values);
        } else {
          for (int n = 0; n < kBlockKV; ++n) values[n] = block.v[n] + h * p_.v_strides.head;
        }
        Accumulate(HeadAt(h), values, block.count, ahead);
      }
    }
    WriteStates();
  }

  /*! Rows of the first head; those past the end repeat the last one, their logits are masked. */
  struct Block {
    int32_t count = 0;
    const TKV* k[kBlockKV];
    const TKV* v[kBlockKV];
  };

  void Gather(int32_t begin, int32_t end, Block* block) const {
    block->count = std::max(0, std::min<int32_t>(kBlockKV, end - begin));
    if (block->count == 0) return;
    k_rows_.Gather(begin, block->count, block->k);
    v_rows_.Gather(begin, block->count, block->v);
    for (int32_t i = block->count; i < kBlockKV; ++i) {
      block->k[i] = block->k[block->count - 1];
      block->v[i] = block->v[block->count - 1];
    }
  }

  void LoadQueries() {
    const TQ* q = static_cast<const TQ*>(p_.q);
    for (int i = 0; i < kLanes; ++i) {
      const int32_t token = rows_.Token(std::min(i / kPackTokens, kRows - 1));
      request_[i] = p_.plan.q_request[token];
      q_idx_[i] = p_.plan.q_position[token];
    }
    for (int32_t h = 0; h < heads_; ++h) {
      const Head head = HeadAt(h);
      const PackedRows rows(p_, items_[h]);
      for (int r = 0; r < kRows; ++r) {
        const int32_t token = rows.Token(r);
        const TQ* from = q + token * p_.q_token_stride + rows.Head(r) * p_.q_head_stride;
        if constexpr (kPairKeys) {
          std::memcpy(reinterpret_cast<TQ*>(head.q) + r * kDimQK, from, kDimQK * sizeof(TQ));
          continue;
        }
        float* to = head.q + r * kPaddedQK;
        const RowIndex at{p_.plan.q_request[token],
                          p_.plan.q_position[token],
                          rows.Head(r),
                          items_[h].head,
                          token,
                          {}};
        float buffer[2 * kPaddedQK];
        const float* row = QueryRow<kDimQK, Variant>(from, variant_, at, buffer);
        for (int d = 0; d < kPaddedQK; ++d) to[d] = row[d] * p_.sm_scale;
      }
      std::fill_n(head.o, kRows * kPaddedVO, 0.0f);
      Store(head.max, Broadcast(Variant::kSoftmax ? -kInf : 0.0f));
      Store(head.sum, VFloat{});
      Store(head.rescale, Broadcast(1.0f));
    }
  }

  /*! Rows of a block of head h transformed into `to`, which `rows` point into. */
  template <int kDim, typename Fn>
  void TransformRows(const TKV* const* first_head, int64_t offset, int32_t count, int32_t position,
                     int32_t h, const int32_t* slots, const Fn& transform, float* to,
                     const float** rows) {
    const TKV* source[kBlockKV];
    for (int32_t i = 0; i < count; ++i) source[i] = first_head[i] + offset;
    const RowIndex at{0, position, 0, items_[h].head, 0, {}};
    TransformBlock<kDim>(source, count, at, slots, transform, to, rows);
    for (int32_t i = count; i < kBlockKV; ++i) rows[i] = rows[count - 1];
  }

  /*! A pack of logits: Q[row] . K[token], scaled. */
  VFloat Scores(const Head& head, const Key* const* k, const Ahead& ahead) const {
    VFloat acc[kLanes] = {};
    if constexpr (kPairKeys) {
      const auto* q = reinterpret_cast<const TQ*>(head.q);
#pragma GCC unroll 2
      for (int d = 0; d < kDimQK; d += kPairLanes) {
        VInt key[kPackTokens];
        for (int t = 0; t < kPackTokens; ++t) {
          ahead.Line(d / kLine * kPackTokens + t);
          key[t] = LoadPairs(k[t] + d);
        }
        for (int r = 0; r < kRows; ++r) {
          const VInt query = LoadPairs(q + r * kDimQK + d);
          for (int t = 0; t < kPackTokens; ++t) {
            VFloat& sum = acc[r * kPackTokens + t];
            sum = Dot(sum, key[t], query);
          }
        }
      }
      return AddLanes(acc) * p_.sm_scale;
    } else {
#pragma GCC unroll 2
      for (int d = 0; d < kPaddedQK; d += kLanes) {
        VFloat key[kPackTokens];
        for (int t = 0; t < kPackTokens; ++t) {
          if (!kKeys && d % kLine == 0) ahead.Line(d / kLine * kPackTokens + t);
          key[t] = LoadRow<kDimQK>(k[t], d);
        }
        for (int r = 0; r < kRows; ++r) {
          const VFloat query = Load(head.q + r * kPaddedQK + d);
          for (int t = 0; t < kPackTokens; ++t) acc[r * kPackTokens + t] += key[t] * query;
        }
      }
      return AddLanes(acc);
    }
  }

  /*! The variant's logits transform and, where the tile is mixed, its mask. */
  void Transform(const Head& head, int32_t h, int32_t kv_position, int32_t count, bool masked) {
    if (!Variant::kHasLogits && !masked && count == kBlockKV) return;
    const VInt row = Iota() / kPackTokens, token = Iota() % kPackTokens;
    ElementIndex<VInt> at;
    std::memcpy(&at.request, request_, sizeof(VInt));
    std::memcpy(&at.q_idx, q_idx_, sizeof(VInt));
    at.kv_head = Broadcast(items_[h].head);
    at.q_head =
        items_[h].head * rows_.group + SimdLanes::Min(row, Broadcast(kRows - 1)) % rows_.group;
    for (int pack = 0; pack < kPacks; ++pack) {
      const VInt index = token + pack * kPackTokens;
      // Lanes past the end repeat the last key: a variant may index a tensor with it.
      at.kv_idx = SimdLanes::Min(index, Broadcast(count - 1)) + kv_position;
      VInt visible = index < count;
      float* s = head.s + pack * kLanes;
      VFloat x = Load(s);
      if constexpr (Variant::kHasLogits) x = Variant::template Logits<SimdLanes>(variant_, x, at);
      if (masked) visible = visible & Variant::template Mask<SimdLanes>(variant_, at);
      Store(s, Select(visible, x, Broadcast(Variant::kSoftmax ? -kInf : 0.0f)));
    }
  }

  /*! Online softmax (Milakov and Gimelshein, 2018) of a head's block: S becomes P. */
  static void Softmax(const Head& head) {
    if constexpr (!Variant::kSoftmax) {
      for (int pack = 0; pack < kPacks; ++pack) {
        StoreWeights(head, pack, Load(head.s + pack * kLanes));
      }
      return;
    }
    const VFloat old_max = Load(head.max);
    VFloat max = old_max;
    for (int pack = 0; pack < kPacks; ++pack) max = Max(max, Load(head.s + pack * kLanes));
    max = MaxOfGroups<kPackTokens>(max);
    // A row that has seen no visible key has max -inf: subtract 0 so that exp(-inf) = 0.
    const VFloat safe = Select(max == -kInf, VFloat{}, max);
    const VFloat rescale = ExpOfWeight(old_max - safe);
    VFloat sum = Load(head.sum) * rescale;
    for (int pack = 0; pack < kPacks; ++pack) {
      const VFloat e = ExpOfWeight(Load(head.s + pack * kLanes) - safe);
      sum += e;
      StoreWeights(head, pack, e);
    }
    Store(head.max, max);
    Store(head.sum, sum);
    Store(head.rescale, rescale);
  }

  /*! In place: weights take no more room than logits, so those still to come are untouched. */
  static void StoreWeights(const Head& head, int pack, VFloat weights) {
    if constexpr (kPairValues) {
      StoreRounded(reinterpret_cast<TKV*>(head.s) + pack * kLanes, weights);
    } else {
      Store(head.s + pack * kLanes, weights);
    }
  }

  /*! O[row] = O[row] * rescale + P[row] V, a few vectors of the head at a time. */
  static void Accumulate(const Head& head, const Value* const* v, int32_t count,
                         const Ahead& ahead) {
    //! Accumulators that leave registers for operands.
    constexpr int kAccumulators = kRegisters == 32 ? 16 : 8;
    constexpr int kFit = kAccumulators / kRows >= 8   ? 8
                         : kAccumulators / kRows >= 4 ? 4
                         : kAccumulators / kRows >= 2 ? 2
                                                      : 1;
    constexpr int kWidth = kPairValues ? std::max(kFit, 2) : kFit;
    constexpr int kStep = kWidth * kLanes;
    int d = 0;
    for (; d + kStep <= kPaddedVO; d += kStep) {
      AccumulateVectors<kWidth>(head, v, count, d, ahead);
    }
    constexpr int kTail = kPaddedVO / kLanes % kWidth;
    if constexpr (kTail > 0) AccumulateVectors<kTail>(head, v, count, d, ahead);
  }

  template <int kWidth>
  static void AccumulateVectors(const Head& head, const Value* const* v, int32_t count, int d,
                                const Ahead& ahead) {
    constexpr int kLines = (kWidth * kLanes + kLine - 1) / kLine;  // of a token here
    const int line = d / kLine * kBlockKV;
    VFloat acc[kRows][kWidth];
    for (int r = 0; r < kRows; ++r) {
      const VFloat rescale = Broadcast(head.rescale[r * kPackTokens]);
      for (int j = 0; j < kWidth; ++j) {
        acc[r][j] = Load(head.o + r * kPaddedVO + d + j * kLanes) * rescale;
      }
    }
    if constexpr (kPairValues) {
      const auto* weights = reinterpret_cast<const TKV*>(head.s);
      for (int32_t n = 0; n < count; n += kPackTokens, weights += kLanes) {
        for (int t = 0; t < kPackTokens; t += 2) {
          for (int j = 0; j < kWidth; j += 2) {
            ahead.Line(line + (n + t) * kLines + j);
            ahead.Line(line + (n + t) * kLines + j + 1);
            const auto first = LoadPairs(v[n + t] + d + j * kLanes);
            const auto second = LoadPairs(v[n + t + 1] + d + j * kLanes);
            const auto low = InterleaveLow(first, second), high = InterleaveHigh(first, second);
            for (int r = 0; r < kRows; ++r) {
              const auto pair = BroadcastWord(
                  *reinterpret_cast<const BFloat16Pair*>(weights + r * kPackTokens + t));
              acc[r][j] = Dot(acc[r][j], low, pair);
              acc[r][j + 1] = Dot(acc[r][j + 1], high, pair);
            }
          }
        }
      }
    } else {
      const float* s = head.s;
      for (int32_t n = 0; n < count; n += kPackTokens, s += kLanes) {
        for (int t = 0; t < kPackTokens; ++t) {
          VFloat value[kWidth];
          for (int j = 0; j < kWidth; ++j) {
            if (!kValues && j * kLanes % kLine == 0) {
              ahead.Line(line + (n + t) * kLines + j * kLanes / kLine);
            }
            value[j] = LoadRow<kDimVO>(v[n + t], d + j * kLanes);
          }
          for (int r = 0; r < kRows; ++r) {
            const VFloat weight = Broadcast(s[r * kPackTokens + t]);
            for (int j = 0; j < kWidth; ++j) acc[r][j] += weight * value[j];
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kWidth; ++j) Store(head.o + r * kPaddedVO + d + j * kLanes, acc[r][j]);
    }
  }

  /*! Where element d of an output is in a row of O: Interleave* permute those of kPairLanes. */
  static int OutputAt(int d) {
    if constexpr (kPairValues) {
      const int in_pairs = d % kPairLanes;
      return d - in_pairs + InterleavedAt(in_pairs);
    }
    return d;
  }

  void WriteStates() {
    for (int32_t h = 0; h < heads_; ++h) {
      const Head head = HeadAt(h);
      const StateWriter<Variant, TQ, kDimVO> writer(p_, items_[h]);
      for (int r = 0; r < kRows; ++r) {
        float sum = 0.0f;
        for (int t = 0; t < kPackTokens; ++t) sum += head.sum[r * kPackTokens + t];
        const float* o = head.o + r * kPaddedVO;
        writer.Write(r, head.max[r * kPackTokens], sum, [o](int d) { return o[OutputAt(d)]; });
      }
    }
  }

  const AttentionParams& p_;
  const WorkItem* items_;
  int32_t heads_;
  PackedRows rows_;
  const Params& variant_;
  KVRows<TKV> k_rows_, v_rows_;
  float *scratch_, *key_block_, *value_block_;
  int32_t request_[kLanes], q_idx_[kLanes];
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_FEW_ROWS_H_
