// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What the CPU paths for many packed rows share, whatever computes their two matrix products.
//
// Rows are grouped into panels of kPanel, whose logits S lie as [key][row]: vectors run along query
// rows, so online softmax needs no horizontal operation, and a variant sees a vector of queries
// against one key.
#ifndef TVM_FLASHINFER_CPU_MANY_ROWS_BASE_H_
#define TVM_FLASHINFER_CPU_MANY_ROWS_BASE_H_

#include <algorithm>
#include <cstring>

#include "row_transform.h"
#include "state_writer.h"
#include "tile.h"

namespace tvm_flashinfer {
namespace cpu {

template <typename TQ, typename TKV, int kDimQK, int kDimVO, typename Variant, int kBlockKVSize>
class ManyRowsBase {
 public:
  //! Vectors of a panel.
  static constexpr int kPanelVectors = 2;
  static constexpr int kPanel = kPanelVectors * kLanes;
  static constexpr int kBlockKV = kBlockKVSize;

 protected:
  using Params = typename Variant::Params;

  static int32_t Panels(int32_t rows) { return (rows + kPanel - 1) / kPanel; }

  /*! Floats of o_, max_, sum_ and the index vectors. */
  static int64_t BaseFloats(int32_t max_rows) {
    return int64_t{Panels(max_rows)} * kPanel * (kDimVO + 2 + 3);
  }

  ManyRowsBase(const AttentionParams& p, const WorkItem& item, float* scratch)
      : p_(p),
        item_(item),
        rows_(p, item),
        variant_(*static_cast<const Params*>(p.variant_params)),
        panels_(Panels(rows_.count)),
        scratch_(scratch) {
    o_ = Take(int64_t{panels_} * kPanel * kDimVO);
    max_ = Take(panels_ * kPanel);
    sum_ = Take(panels_ * kPanel);
    q_idx_ = reinterpret_cast<int32_t*>(Take(panels_ * kPanel));
    q_head_ = reinterpret_cast<int32_t*>(Take(panels_ * kPanel));
    request_ = reinterpret_cast<int32_t*>(Take(panels_ * kPanel));
  }

  /*! The next `n` floats of scratch. */
  float* Take(int64_t n) {
    float* at = scratch_;
    scratch_ += n;
    return at;
  }

  /*! A block's rows in the pool. */
  struct Block {
    int32_t begin = 0, count = 0;
    int32_t position = 0;  //!< of the first key in its requests
    const TKV* k[kBlockKV];
    const TKV* v[kBlockKV];
  };

  /*!
   * Call visit(block, masked) for each block of keys that the variant doesn't hide as a whole; the
   * block after it is known by then, for PrefetchShare.
   */
  template <typename Visit>
  void ForEachBlock(const KVRows<TKV>& k_rows, const KVRows<TKV>& v_rows, const Visit& visit) {
    TileRange range;
    QueryRange(p_, item_, &range);
    const int32_t position = p_.plan.KVPosition(item_.level, item_.row);
    const int32_t end = item_.kv_begin + item_.kv_count;
    Block blocks[2];
    const auto gather = [&](int32_t begin, Block* block) {
      block->begin = begin;
      block->position = position + begin;
      block->count = std::max(0, std::min<int32_t>(kBlockKV, end - begin));
      k_rows.Gather(begin, block->count, block->k);
      v_rows.Gather(begin, block->count, block->v);
    };
    gather(item_.kv_begin, &blocks[0]);
    int parity = 0;
    for (int32_t begin = item_.kv_begin; begin < end; begin += kBlockKV, parity ^= 1) {
      gather(begin + kBlockKV, &blocks[parity ^ 1]);
      prefetch_ = &blocks[parity ^ 1];
      prefetch_line_ = 0;
      const Block& block = blocks[parity];
      range.kv_lo = block.position;
      range.kv_hi = block.position + block.count - 1;
      const TileClass tile = Variant::Classify(variant_, range);
      if (tile != TileClass::kEmpty) visit(block, tile == TileClass::kMixed);
    }
  }

  /*!
   * Start every row's state and index vectors, and hand out its query: store(row, query) gets
   * kDimQK elements, float32 and transformed by the variant, or as they are if `kRaw` and there is
   * no transform. Rows past the end repeat the last one; their states are never written.
   */
  template <bool kRaw, typename StoreQuery>
  void LoadQueries(const StoreQuery& store) {
    const TQ* q = static_cast<const TQ*>(p_.q);
    for (int32_t row = 0; row < panels_ * kPanel; ++row) {
      const int32_t source = std::min(row, rows_.count - 1);
      const int32_t token = rows_.Token(source);
      const int32_t head = rows_.Head(source);
      const TQ* from = q + token * p_.q_token_stride + head * p_.q_head_stride;
      if constexpr (kRaw && !Variant::kHasQuery) {
        store(row, from);
      } else {
        const RowIndex at{
            p_.plan.q_request[token], p_.plan.q_position[token], head, item_.head, token, {}};
        float buffer[2 * kPaddedDim<kDimQK>];
        store(row, QueryRow<kDimQK, Variant>(from, variant_, at, buffer));
      }
      q_idx_[row] = p_.plan.q_position[token];
      request_[row] = p_.plan.q_request[token];
      q_head_[row] = head;
      max_[row] = Variant::kSoftmax ? -kInf : 0.0f;
      sum_[row] = 0.0f;
    }
    std::fill_n(o_, int64_t{panels_} * kPanel * kDimVO, 0.0f);
  }

  /*! Keys of a block as float32, transformed by the variant; `buffer` as for TransformBlock. */
  void TransformKeys(const Block& block, const KVRows<TKV>& pool, float* buffer,
                     const float** rows) {
    TransformRows<kDimQK>(block, block.k, pool, buffer, rows,
                          [this](const auto& x, const auto& at) {
                            return Variant::template Key<SimdLanes>(variant_, x, at);
                          });
  }
  void TransformValues(const Block& block, const KVRows<TKV>& pool, float* buffer,
                       const float** rows) {
    TransformRows<kDimVO>(block, block.v, pool, buffer, rows,
                          [this](const auto& x, const auto& at) {
                            return Variant::template Value<SimdLanes>(variant_, x, at);
                          });
  }

  /*!
   * Prefetch one of `steps` shares of the next block, in address order. A step's product outlasts
   * the lines it asks for, so the pages of the next block arrive while this one is computed.
   */
  void PrefetchShare(int32_t steps) {
    constexpr int kUnits = 64 / static_cast<int>(sizeof(TKV));  // of a cache line
    constexpr int kLine = kUnits * kElementsPerUnit<TKV>;
    constexpr int kLinesK = (kDimQK + kLine - 1) / kLine;
    constexpr int kLinesV = (kDimVO + kLine - 1) / kLine;
    const int32_t total = prefetch_->count * (kLinesK + kLinesV);
    const int32_t end =
        std::min(total, prefetch_line_ + kBlockKV * (kLinesK + kLinesV) / steps + 1);
    for (; prefetch_line_ < end; ++prefetch_line_) {
      const int32_t v_line = prefetch_line_ - prefetch_->count * kLinesK;
      Prefetch(v_line < 0
                   ? prefetch_->k[prefetch_line_ / kLinesK] + prefetch_line_ % kLinesK * kUnits
                   : prefetch_->v[v_line / kLinesV] + v_line % kLinesV * kUnits);
    }
  }

  /*! The variant's logits transform of s * scale and, where the tile is mixed, its mask. */
  void Transform(int32_t panel, int32_t kv_position, int32_t count, bool masked, float scale,
                 float* logits) const {
    for (int j = 0; j < kPanelVectors; ++j) {
      const int32_t row = panel * kPanel + j * kLanes;
      ElementIndex<VInt> at;
      std::memcpy(&at.request, request_ + row, sizeof(VInt));
      std::memcpy(&at.q_idx, q_idx_ + row, sizeof(VInt));
      std::memcpy(&at.q_head, q_head_ + row, sizeof(VInt));
      at.kv_head = Broadcast(item_.head);
      for (int32_t n = 0; n < count; ++n) {
        at.kv_idx = Broadcast(kv_position + n);
        float* s = logits + n * kPanel + j * kLanes;
        VFloat x = Load(s) * scale;
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

  void WriteStates() const {
    const StateWriter<Variant, TQ, kDimVO> writer(p_, item_);
    for (int32_t row = 0; row < rows_.count; ++row) {
      const float* o = o_ + int64_t{row / kPanel} * kPanel * kDimVO + row % kPanel;
      float values[kDimVO];  // contiguous, so that what follows is vectors
      for (int d = 0; d < kDimVO; ++d) values[d] = o[d * kPanel];
      writer.Write(row, max_[row], sum_[row], [&values](int d) { return values[d]; });
    }
  }

  const AttentionParams& p_;
  const WorkItem& item_;
  PackedRows rows_;
  const Params& variant_;
  int32_t panels_;
  float *o_, *max_, *sum_;  //!< o_: [panel][element][row of the panel], not normalised
  int32_t *q_idx_, *q_head_, *request_;

 private:
  template <int kDim, typename Transform>
  void TransformRows(const Block& block, const TKV* const* source, const KVRows<TKV>& pool,
                     float* buffer, const float** rows, const Transform& transform) {
    int32_t slots[kBlockKV];
    pool.Slots(block.begin, block.count, slots);
    const RowIndex first{0, block.position, 0, item_.head, 0, {}};
    TransformBlock<kDim>(source, block.count, first, slots, transform, buffer, rows);
  }

  float* scratch_;
  const Block* prefetch_ = nullptr;
  int32_t prefetch_line_ = 0;
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_MANY_ROWS_BASE_H_
