// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The CPU path for many packed rows (prefill, append, large GQA groups): lanes are query rows.
//
// Queries are packed once per item as panels [head_dim][kPanel], so that S = K Q and O = V P are
// the same register-blocked product: vectors run along query rows, and elements of K and V are
// broadcast straight from their pages.
#ifndef TVM_FLASHINFER_CPU_MANY_ROWS_H_
#define TVM_FLASHINFER_CPU_MANY_ROWS_H_

#include <type_traits>

#include "many_rows_base.h"

namespace tvm_flashinfer {
namespace cpu {

template <typename TQ, typename TKV, int kDimQK, int kDimVO, typename Variant>
class ManyRows : ManyRowsBase<TQ, TKV, kDimQK, kDimVO, Variant, 64> {
  using Base = ManyRowsBase<TQ, TKV, kDimQK, kDimVO, Variant, 64>;
  using typename Base::Block;

 public:
  using Base::kBlockKV;

  static int64_t ScratchFloats(int32_t max_rows) {
    return Base::BaseFloats(max_rows) + int64_t{Base::Panels(max_rows)} * kPanel * kDimQK +
           (kBlockKV + kBlockRows) * kPanel + (kConvertK ? kBlockFloats<kDimQK> : 0) +
           (kConvertV ? kBlockFloats<kDimVO> : 0);
  }

  static void Run(const AttentionParams& p, const WorkItem& item, float* scratch) {
    ManyRows(p, item, scratch).Run();
  }

 private:
  using Base::kPanel;
  using Base::kPanelVectors;
  //! With kPanelVectors accumulators each, they fill the registers.
  static constexpr int kBlockRows = kRegisters == 32 ? 8 : 6;
  //! Whether rows are read from a block of scratch, not in their pages.
  static constexpr bool kConvertK = !std::is_same_v<TKV, float> || Variant::kHasKey;
  static constexpr bool kConvertV = !std::is_same_v<TKV, float> || Variant::kHasValue;
  template <int kDim>
  static constexpr int kBlockFloats = (kBlockKV + 1) * kPaddedDim<kDim>;

  ManyRows(const AttentionParams& p, const WorkItem& item, float* scratch)
      : Base(p, item, scratch) {
    q_ = Base::Take(int64_t{panels_} * kPanel * kDimQK);
    s_ = Base::Take((kBlockKV + kBlockRows) * kPanel);
    if constexpr (kConvertK) k_block_ = Base::Take(kBlockFloats<kDimQK>);
    if constexpr (kConvertV) v_block_ = Base::Take(kBlockFloats<kDimVO>);
  }

  void Run() {
    Base::template LoadQueries<false>([this](int32_t row, const float* query) {
      float* to = q_ + int64_t{row / kPanel} * kPanel * kDimQK + row % kPanel;
      for (int d = 0; d < kDimQK; ++d) to[d * kPanel] = query[d] * p_.sm_scale;
    });
    const KVRows<TKV> k_rows(p_.k, p_.k_strides, p_, item_);
    const KVRows<TKV> v_rows(p_.v, p_.v_strides, p_, item_);
    Base::ForEachBlock(k_rows, v_rows, [&](const Block& block, bool masked) {
      const int32_t count = block.count;
      const float* k[kBlockKV + kBlockRows];
      const float* v[kBlockKV];
      if constexpr (Variant::kHasKey) {
        Base::TransformKeys(block, k_rows, k_block_, k);
      } else {
        LoadBlock<kDimQK>(block.k, count, k_block_, k);
      }
      if constexpr (Variant::kHasValue) {
        Base::TransformValues(block, v_rows, v_block_, v);
      } else {
        LoadBlock<kDimVO>(block.v, count, v_block_, v);
      }
      // Rows past the end repeat the last one: their logits are never read.
      for (int32_t i = 0; i < kBlockRows; ++i) k[count + i] = k[count - 1];
      for (int32_t panel = 0; panel < panels_; ++panel) {
        Scores(panel, k, count);
        if (Variant::kHasLogits || masked) {
          Base::Transform(panel, block.position, count, masked, 1.0f, s_);
        }
        VFloat rescale[kPanelVectors];
        Softmax(panel, count, rescale);
        Accumulate(panel, v, count, rescale);
      }
    });
    Base::WriteStates();
  }

  /*! Point rows at a block's tokens as float32: in their pages, or converted into `block`. */
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

  /*! S[n][row] = K[n] . Q[row] */
  void Scores(int32_t panel, const float* const* k, int32_t count) {
    constexpr int kSteps = (kBlockKV + kBlockRows - 1) / kBlockRows;
    const float* q = q_ + int64_t{panel} * kPanel * kDimQK;
    for (int32_t n = 0; n < count; n += kBlockRows) {
      Base::PrefetchShare(kSteps * panels_);
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

  using Base::item_;
  using Base::max_;
  using Base::o_;
  using Base::p_;
  using Base::panels_;
  using Base::sum_;
  float *q_, *s_;
  float *k_block_ = nullptr, *v_block_ = nullptr;
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_MANY_ROWS_H_
