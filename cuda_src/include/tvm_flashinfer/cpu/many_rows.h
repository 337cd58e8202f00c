// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The CPU path for many packed rows (prefill, append, large GQA groups): lanes are query rows.
//
// Queries are packed once per item as panels [head_dim][kPanel], so that S = K Q and O = V P are
// the same register-blocked product: vectors run along query rows, and elements of K and V are
// broadcast straight from their pages. Logits of a key lie in lanes, so online softmax needs no
// horizontal operation and a variant sees a vector of queries against one key.
#ifndef TVM_FLASHINFER_CPU_MANY_ROWS_H_
#define TVM_FLASHINFER_CPU_MANY_ROWS_H_

#include <cmath>
#include <type_traits>

#include "row_transform.h"
#include "state_writer.h"
#include "tile.h"

namespace tvm_flashinfer {
namespace cpu {

template <typename TQ, typename TKV, int kDimQK, int kDimVO, typename Variant>
class ManyRows {
 public:
  //! Vectors of a panel; with kBlockRows accumulators each, they fill the registers.
  static constexpr int kPanelVectors = 2;
  static constexpr int kPanel = kPanelVectors * kLanes;
  static constexpr int kBlockRows = kRegisters == 32 ? 8 : 6;
  static constexpr int kBlockKV = 64;

  static int64_t ScratchFloats(int32_t max_rows) {
    const int64_t panels = (max_rows + kPanel - 1) / kPanel;
    return panels * kPanel * (kDimQK + kDimVO + 2 + 3) + (kBlockKV + kBlockRows) * kPanel +
           (kConvertK ? kBlockFloats<kDimQK> : 0) + (kConvertV ? kBlockFloats<kDimVO> : 0);
  }

  static void Run(const AttentionParams& p, const WorkItem& item, float* scratch) {
    ManyRows(p, item, scratch).Run();
  }

 private:
  //! Whether rows are read from a block of scratch, not in their pages.
  static constexpr bool kConvertK = !std::is_same_v<TKV, float> || Variant::kHasKey;
  static constexpr bool kConvertV = !std::is_same_v<TKV, float> || Variant::kHasValue;
  template <int kDim>
  static constexpr int kBlockFloats = (kBlockKV + 1) * kPaddedDim<kDim>;
  using Params = typename Variant::Params;

  ManyRows(const AttentionParams& p, const WorkItem& item, float* scratch)
      : p_(p),
        item_(item),
        rows_(p, item),
        variant_(*static_cast<const Params*>(p.variant_params)),
        panels_((rows_.count + kPanel - 1) / kPanel) {
    auto take = [&](int64_t n) {
      float* at = scratch;
      scratch += n;
      return at;
    };
    q_ = take(int64_t{panels_} * kPanel * kDimQK);
    o_ = take(int64_t{panels_} * kPanel * kDimVO);
    max_ = take(panels_ * kPanel);
    sum_ = take(panels_ * kPanel);
    q_idx_ = reinterpret_cast<int32_t*>(take(panels_ * kPanel));
    q_head_ = reinterpret_cast<int32_t*>(take(panels_ * kPanel));
    request_ = reinterpret_cast<int32_t*>(take(panels_ * kPanel));
    s_ = take((kBlockKV + kBlockRows) * kPanel);
    if constexpr (kConvertK) k_block_ = take(kBlockFloats<kDimQK>);
    if constexpr (kConvertV) v_block_ = take(kBlockFloats<kDimVO>);
  }

  /*! A block's rows in the pool. */
  struct Block {
    int32_t count = 0;
    const TKV* k[kBlockKV];
    const TKV* v[kBlockKV];
  };

  void Run() {
    PackQueries();
    TileRange range;
    QueryRange(p_, item_, &range);
    const KVRows<TKV> k_rows(p_.k, p_.k_strides, p_, item_);
    const KVRows<TKV> v_rows(p_.v, p_.v_strides, p_, item_);
    const int32_t position = p_.plan.KVPosition(item_.level, item_.row);
    const int32_t end = item_.kv_begin + item_.kv_count;
    Block blocks[2];
    const auto gather = [&](int32_t begin, Block* block) {
      block->count = std::max(0, std::min<int32_t>(kBlockKV, end - begin));
      k_rows.Gather(begin, block->count, block->k);
      v_rows.Gather(begin, block->count, block->v);
    };
    gather(item_.kv_begin, &blocks[0]);
    int parity = 0;
    for (int32_t begin = item_.kv_begin; begin < end; begin += kBlockKV, parity ^= 1) {
      const Block& block = blocks[parity];
      gather(begin + kBlockKV, &blocks[parity ^ 1]);
      prefetch_ = &blocks[parity ^ 1];
      prefetch_line_ = 0;
      const int32_t count = block.count;
      range.kv_lo = position + begin;
      range.kv_hi = range.kv_lo + count - 1;
      const TileClass tile = Variant::Classify(variant_, range);
      if (tile == TileClass::kEmpty) continue;
      const float* k[kBlockKV + kBlockRows];
      const float* v[kBlockKV];
      LoadKeys(block, range.kv_lo, k_rows, begin, k);
      LoadValues(block, range.kv_lo, v_rows, begin, v);
      // Rows past the end repeat the last one: their logits are never read.
      for (int32_t i = 0; i < kBlockRows; ++i) k[count + i] = k[count - 1];
      for (int32_t panel = 0; panel < panels_; ++panel) {
        Scores(panel, k, count);
        Transform(panel, range.kv_lo, count, tile == TileClass::kMixed);
        VFloat rescale[kPanelVectors];
        Softmax(panel, count, rescale);
        Accumulate(panel, v, count, rescale);
      }
    }
    WriteStates();
  }

  void PackQueries() {
    const TQ* q = static_cast<const TQ*>(p_.q);
    for (int32_t row = 0; row < panels_ * kPanel; ++row) {
      // Padding rows repeat the last one; their states are never written.
      const int32_t source = std::min(row, rows_.count - 1);
      const int32_t token = rows_.Token(source);
      const int32_t head = rows_.Head(source);
      const TQ* from = q + token * p_.q_token_stride + head * p_.q_head_stride;
      float* to = q_ + int64_t{row / kPanel} * kPanel * kDimQK + row % kPanel;
      if constexpr (Variant::kHasQuery) {
        const RowIndex at{
            p_.plan.q_request[token], p_.plan.q_position[token], head, item_.head, token, {}};
        float buffer[2 * kPaddedDim<kDimQK>];
        const float* query = QueryRow<kDimQK, Variant>(from, variant_, at, buffer);
        for (int d = 0; d < kDimQK; ++d) to[d * kPanel] = query[d] * p_.sm_scale;
      } else {
        for (int d = 0; d < kDimQK; ++d) to[d * kPanel] = ToFloat(from[d]) * p_.sm_scale;
      }
      q_idx_[row] = p_.plan.q_position[token];
      request_[row] = p_.plan.q_request[token];
      q_head_[row] = head;
      max_[row] = Variant::kSoftmax ? -kInf : 0.0f;
      sum_[row] = 0.0f;
    }
    std::fill_n(o_, int64_t{panels_} * kPanel * kDimVO, 0.0f);
  }

  /*! Point rows at a block's keys as float32: in their pages, or in scratch. */
  void LoadKeys(const Block& block, int32_t position, const KVRows<TKV>& pool, int32_t begin,
                const float** rows) {
    if constexpr (Variant::kHasKey) {
      int32_t slots[kBlockKV];
      pool.Slots(begin, block.count, slots);
      TransformBlock<kDimQK>(
          block.k, block.count, RowIndex{0, position, 0, item_.head, 0, {}}, slots,
          [this](const auto& x, const auto& at) {
            return Variant::template Key<SimdLanes>(variant_, x, at);
          },
          k_block_, rows);
    } else {
      LoadBlock<kDimQK>(block.k, block.count, k_block_, rows);
    }
  }
  void LoadValues(const Block& block, int32_t position, const KVRows<TKV>& pool, int32_t begin,
                  const float** rows) {
    if constexpr (Variant::kHasValue) {
      int32_t slots[kBlockKV];
      pool.Slots(begin, block.count, slots);
      TransformBlock<kDimVO>(
          block.v, block.count, RowIndex{0, position, 0, item_.head, 0, {}}, slots,
          [this](const auto& x, const auto& at) {
            return Variant::template Value<SimdLanes>(variant_, x, at);
          },
          v_block_, rows);
    } else {
      LoadBlock<kDimVO>(block.v, block.count, v_block_, rows);
    }
  }
  template <int kDim>
  static void LoadBlock(const TKV* const* source, int32_t count, float* block, const float** rows) {
    for (int32_t i = 0; i < count; ++i) {
      if constexpr (std::is_same_v<TKV, float>) {
        rows[i] = source[i];
      } else {
        rows[i] = block + i * kPaddedDim<kDim>;
        RowToFloat<kDim>(source[i], block + i * kPaddedDim<kDim>);
      }
    }
  }

  /*!
   * Prefetch this step's share of the next block, in address order. A step's product outlasts the
   * lines it asks for, so the pages of the next block arrive while this one is computed.
   */
  void PrefetchShare() {
    constexpr int kUnits = 64 / static_cast<int>(sizeof(TKV));  // of a cache line
    constexpr int kLine = kUnits * kElementsPerUnit<TKV>;
    constexpr int kLinesK = (kDimQK + kLine - 1) / kLine;
    constexpr int kLinesV = (kDimVO + kLine - 1) / kLine;
    constexpr int kSteps = (kBlockKV + kBlockRows - 1) / kBlockRows;
    const int32_t total = prefetch_->count * (kLinesK + kLinesV);
    const int32_t end =
        std::min(total, prefetch_line_ + kBlockKV * (kLinesK + kLinesV) / (kSteps * panels_) + 1);
    for (; prefetch_line_ < end; ++prefetch_line_) {
      const int32_t v_line = prefetch_line_ - prefetch_->count * kLinesK;
      Prefetch(v_line < 0
                   ? prefetch_->k[prefetch_line_ / kLinesK] + prefetch_line_ % kLinesK * kUnits
                   : prefetch_->v[v_line / kLinesV] + v_line % kLinesV * kUnits);
    }
  }

  /*! S[n][row] = K[n] . Q[row] */
  void Scores(int32_t panel, const float* const* k, int32_t count) {
    const float* q = q_ + int64_t{panel} * kPanel * kDimQK;
    for (int32_t n = 0; n < count; n += kBlockRows) {
      PrefetchShare();
      VFloat acc[kBlockRows][kPanelVectors] = {};
      const float* row[kBlockRows];
      for (int i = 0; i < kBlockRows; ++i) row[i] = k[n + i];
      for (int d = 0; d < kDimQK; ++d) {
        VFloat lanes[kPanelVectors];
        for (int j = 0; j < kPanelVectors; ++j) lanes[j] = Load(q + d * kPanel + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kBlockRows; ++i) {
          const VFloat x = Broadcast(row[i][d]);
          for (int j = 0; j < kPanelVectors; ++j) acc[i][j] += x * lanes[j];
        }
      }
      for (int i = 0; i < kBlockRows; ++i) {
        for (int j = 0; j < kPanelVectors; ++j)
          Store(s_ + (n + i) * kPanel + j * kLanes, acc[i][j]);
      }
    }
  }

  /*! The variant's logits transform and, where the tile is mixed, its mask. */
  void Transform(int32_t panel, int32_t kv_position, int32_t count, bool masked) {
    if (!Variant::kHasLogits && !masked) return;
    for (int j = 0; j < kPanelVectors; ++j) {
      const int32_t row = panel * kPanel + j * kLanes;
      ElementIndex<VInt> at;
      std::memcpy(&at.request, request_ + row, sizeof(VInt));
      std::memcpy(&at.q_idx, q_idx_ + row, sizeof(VInt));
      std::memcpy(&at.q_head, q_head_ + row, sizeof(VInt));
      at.kv_head = Broadcast(item_.head);
      for (int32_t n = 0; n < count; ++n) {
        at.kv_idx = Broadcast(kv_position + n);
        float* s = s_ + n * kPanel + j * kLanes;
        VFloat x = Load(s);
        if constexpr (Variant::kHasLogits) {
          x = Variant::template Logits<SimdLanes>(variant_, x, at);
        }
        if (masked) {
          constexpr float kHidden = Variant::kSoftmax ? -kInf : 0.0f;
          x = Select(Variant::template Mask<SimdLanes>(variant_, at), x, Broadcast(kHidden));
        }
        Store(s, x);
      }
    }
  }

  /*! Online softmax (Milakov and Gimelshein, 2018): S becomes P; returns the old state's factor. */
  void Softmax(int32_t panel, int32_t count, VFloat* rescale) {
    if constexpr (!Variant::kSoftmax) {
      std::fill_n(rescale, kPanelVectors, Broadcast(1.0f));
      return;
    }
    for (int j = 0; j < kPanelVectors; ++j) {
      const int32_t row = panel * kPanel + j * kLanes;
      const VFloat old_max = Load(max_ + row);
      VFloat max = old_max;
      for (int32_t n = 0; n < count; ++n) max = Max(max, Load(s_ + n * kPanel + j * kLanes));
      // A row that has seen no visible key has max -inf: subtract 0 so that exp(-inf) = 0.
      const VFloat safe = Select(max == -kInf, VFloat{}, max);
      rescale[j] = Exp(old_max - safe);
      VFloat sum = VFloat{};
      for (int32_t n = 0; n < count; ++n) {
        float* s = s_ + n * kPanel + j * kLanes;
        const VFloat e = Exp(Load(s) - safe);
        sum += e;
        Store(s, e);
      }
      Store(max_ + row, max);
      Store(sum_ + row, Load(sum_ + row) * rescale[j] + sum);
    }
  }

  /*! O = O * rescale + V^T P */
  void Accumulate(int32_t panel, const float* const* v, int32_t count, const VFloat* rescale) {
    float* o = o_ + int64_t{panel} * kPanel * kDimVO;
    int d = 0;
    for (; d + kBlockRows <= kDimVO; d += kBlockRows) {
      AccumulateRows<kBlockRows>(v, count, d, rescale, o);
    }
    constexpr int kTail = kDimVO % kBlockRows;
    if constexpr (kTail > 0) AccumulateRows<kTail>(v, count, d, rescale, o);
  }

  template <int kRows>
  void AccumulateRows(const float* const* v, int32_t count, int d, const VFloat* rescale,
                      float* o) {
    VFloat acc[kRows][kPanelVectors] = {};
    for (int32_t n = 0; n < count; ++n) {
      VFloat lanes[kPanelVectors];
      for (int j = 0; j < kPanelVectors; ++j) lanes[j] = Load(s_ + n * kPanel + j * kLanes);
      const float* row = v[n] + d;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const VFloat x = Broadcast(row[i]);
        for (int j = 0; j < kPanelVectors; ++j) acc[i][j] += x * lanes[j];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kPanelVectors; ++j) {
        float* at = o + (d + i) * kPanel + j * kLanes;
        Store(at, Load(at) * rescale[j] + acc[i][j]);
      }
    }
  }

  void WriteStates() {
    const StateWriter<Variant, TQ, kDimVO> writer(p_, item_);
    for (int32_t row = 0; row < rows_.count; ++row) {
      const float* o = o_ + int64_t{row / kPanel} * kPanel * kDimVO + row % kPanel;
      writer.Write(row, max_[row], sum_[row], [o](int d) { return o[d * kPanel]; });
    }
  }

  const AttentionParams& p_;
  const WorkItem& item_;
  PackedRows rows_;
  const Params& variant_;
  int32_t panels_;
  float *q_, *o_, *max_, *sum_, *s_;
  float *k_block_ = nullptr, *v_block_ = nullptr;
  int32_t *q_idx_, *q_head_, *request_;
  const Block* prefetch_ = nullptr;
  int32_t prefetch_line_ = 0;
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_MANY_ROWS_H_
