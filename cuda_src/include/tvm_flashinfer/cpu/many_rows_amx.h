// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The CPU path for many packed rows of bfloat16 where there are AMX tiles, see amx.h.
//
// Scratch per block of keys: K rows and V^T as bfloat16, which serve all panels, and per panel S
// as [key][row] and P as pairs of keys. Sums, the softmax and O are float32.
#ifndef TVM_FLASHINFER_CPU_MANY_ROWS_AMX_H_
#define TVM_FLASHINFER_CPU_MANY_ROWS_AMX_H_

#include "amx.h"

#ifdef TVM_FLASHINFER_AMX

#include <type_traits>

#include "many_rows_base.h"

namespace tvm_flashinfer {
namespace cpu {

template <typename TKV, int kDimQK, int kDimVO, typename Variant>
class ManyRowsAmx : ManyRowsBase<BFloat16, TKV, kDimQK, kDimVO, Variant, 128> {
  using Base = ManyRowsBase<BFloat16, TKV, kDimQK, kDimVO, Variant, 128>;
  using typename Base::Block;

 public:
  using Base::kBlockKV;

  static int64_t ScratchFloats(int32_t max_rows) {
    return Base::BaseFloats(max_rows) + PanelFloats(Base::Panels(max_rows)) + kBlockFloats;
  }

  static void Run(const AttentionParams& p, const WorkItem& item, float* scratch) {
    ManyRowsAmx(p, item, scratch).Run();
  }

 private:
  using Base::kPanel;
  using Base::kPanelVectors;
  static_assert(kPanel == 2 * amx::kRows, "a panel is two tiles wide");
  static constexpr int kDepthQK = (kDimQK + amx::kDepth - 1) / amx::kDepth * amx::kDepth;
  static constexpr int kHeightVO = (kDimVO + amx::kDepth - 1) / amx::kDepth * amx::kDepth;
  //! Two rows of K tiles, and the depth of P.
  static constexpr int kStepKV = 2 * amx::kRows;
  //! How far above its old maximum a logit must be for the state to be rescaled; P <= e^kSlack.
  static constexpr float kSlack = 6.0f;
  static constexpr bool kConvertK = !std::is_same_v<TKV, BFloat16> || Variant::kHasKey;
  static constexpr bool kConvertV = !std::is_same_v<TKV, BFloat16> || Variant::kHasValue;
  static constexpr int kMaxDim = kDimQK > kDimVO ? kDimQK : kDimVO;
  static constexpr int64_t kRawFloats =
      kConvertK || kConvertV ? int64_t{kBlockKV + 1} * kPaddedDim<kMaxDim> : 0;
  //! S, P, K, V^T with rows of V before the transposition, and rows as float32.
  static constexpr int64_t kBlockFloats = kBlockKV * kPanel + kBlockKV * kPanel / 2 +
                                          kBlockKV * kDepthQK / 2 + kBlockKV * kHeightVO / 2 +
                                          amx::kDepth * kHeightVO / 2 + kRawFloats;
  static int64_t PanelFloats(int32_t panels) { return int64_t{panels} * kPanel * kDepthQK / 2; }

  ManyRowsAmx(const AttentionParams& p, const WorkItem& item, float* scratch)
      : Base(p, item, scratch) {
    const auto take = [this](int64_t floats) {
      return reinterpret_cast<BFloat16*>(Base::Take(floats));
    };
    q_ = take(PanelFloats(panels_));
    s_ = Base::Take(kBlockKV * kPanel);
    p_pairs_ = take(kBlockKV * kPanel / 2);
    k_ = take(kBlockKV * kDepthQK / 2);
    vt_ = take(kBlockKV * kHeightVO / 2);
    v_ = take(amx::kDepth * kHeightVO / 2);
    if constexpr (kRawFloats > 0) raw_ = Base::Take(kRawFloats);
  }

  void Run() {
    const amx::TileScope tiles;
    // The scale meets the logits, not the queries, which it would round once more.
    const float scale = p_.sm_scale;
    std::memset(q_, 0, PanelFloats(panels_) * sizeof(float));
    std::memset(v_, 0, amx::kDepth * kHeightVO * sizeof(BFloat16));
    std::memset(k_, 0, kBlockKV * kDepthQK * sizeof(BFloat16));
    Base::template LoadQueries<true>([this](int32_t row, const auto* query) {
      BFloat16 elements[kDimQK];
      CopyRow<kDimQK>(query, elements);
      BFloat16* to = q_ + int64_t{row / kPanel} * kPanel * kDepthQK + row % kPanel * 2;
      for (int d = 0; d < kDimQK; d += 2) std::memcpy(to + d * kPanel, elements + d, 4);
    });
    const KVRows<TKV> k_rows(p_.k, p_.k_strides, p_, item_);
    const KVRows<TKV> v_rows(p_.v, p_.v_strides, p_, item_);
    Base::ForEachBlock(k_rows, v_rows, [&](const Block& block, bool masked) {
      // Keys past the end are zeros with logits of -inf, values past it zeros.
      const int32_t padded = (block.count + kStepKV - 1) / kStepKV * kStepKV;
      LoadKeys(block, k_rows, padded);
      LoadValues(block, v_rows, padded);
      const bool transform = Variant::kHasLogits || masked || !Variant::kSoftmax || !(scale > 0.0f);
      for (int32_t panel = 0; panel < panels_; ++panel) {
        Scores(panel, padded);
        if (transform) Base::Transform(panel, block.position, block.count, masked, scale, s_);
        constexpr float kPast = Variant::kSoftmax ? -kInf : 0.0f;
        std::fill_n(s_ + block.count * kPanel, (padded - block.count) * kPanel, kPast);
        Softmax(panel, padded, transform ? 1.0f : scale);
        Accumulate(panel, padded);
      }
    });
    Base::WriteStates();
  }

  /*! Copies elements of a row; those past kDim stay what they are, zeros. */
  template <int kDim, typename T>
  static void CopyRow(const T* from, BFloat16* to) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      std::memcpy(to, from, kDim * sizeof(BFloat16));
    } else {
      for (int d = 0; d < kDim; ++d) to[d] = FromFloat<BFloat16>(from[d]);
    }
  }

  void LoadKeys(const Block& block, const KVRows<TKV>& pool, int32_t padded) {
    if constexpr (kConvertK) {
      const float* rows[kBlockKV];
      if constexpr (Variant::kHasKey) {
        Base::TransformKeys(block, pool, raw_, rows);
      } else {
        ToFloats<kDimQK>(block.k, block.count, rows);
      }
      for (int32_t i = 0; i < block.count; ++i) CopyRow<kDimQK>(rows[i], k_ + i * kDepthQK);
    } else {
      for (int32_t i = 0; i < block.count; ++i) CopyRow<kDimQK>(block.k[i], k_ + i * kDepthQK);
    }
    // Zeros, since what an earlier block or item left could be NaN in a lane that counts.
    std::memset(k_ + block.count * kDepthQK, 0,
                (padded - block.count) * kDepthQK * sizeof(BFloat16));
  }

  void LoadValues(const Block& block, const KVRows<TKV>& pool, int32_t padded) {
    if constexpr (kConvertV) {
      const float* rows[kBlockKV];
      if constexpr (Variant::kHasValue) {
        Base::TransformValues(block, pool, raw_, rows);
      } else {
        ToFloats<kDimVO>(block.v, block.count, rows);
      }
      TransposeValues(rows, block.count, padded);
    } else {
      TransposeValues(block.v, block.count, padded);
    }
  }

  template <int kDim>
  void ToFloats(const TKV* const* source, int32_t count, const float** rows) {
    for (int32_t i = 0; i < count; ++i) {
      rows[i] = raw_ + int64_t{i} * kPaddedDim<kDim>;
      RowToFloat<kDim>(source[i], raw_ + int64_t{i} * kPaddedDim<kDim>);
    }
  }

  /*! V^T, [element][key]. */
  template <typename T>
  void TransposeValues(const T* const* rows, int32_t count, int32_t padded) {
    constexpr bool kInPlace = std::is_same_v<T, BFloat16> && kDimVO % amx::kDepth == 0;
    for (int32_t n = 0; n < padded; n += amx::kDepth) {
      const BFloat16* row[amx::kDepth];
      const int32_t here = std::min(count - n, amx::kDepth);
      for (int32_t i = 0; i < amx::kDepth; ++i) {
        BFloat16* copy = v_ + i * kHeightVO;
        if constexpr (kInPlace) {
          row[i] = i < here ? rows[n + i] : copy;  // v_ holds zeros and nothing else
        } else {
          row[i] = copy;
          if (i < here) {
            CopyRow<kDimVO>(rows[n + i], copy);
          } else {
            std::memset(copy, 0, kHeightVO * sizeof(BFloat16));
          }
        }
      }
      for (int d = 0; d < kHeightVO; d += amx::kDepth) {
        const BFloat16* at[amx::kDepth];
        for (int i = 0; i < amx::kDepth; ++i) at[i] = row[i] + d;
        amx::Transpose32x32(at, vt_ + int64_t{d} * kBlockKV + n, kBlockKV);
      }
    }
  }

  /*! S[n][row] = K[n] . Q[row] */
  void Scores(int32_t panel, int32_t padded) {
    const BFloat16* q = q_ + int64_t{panel} * kPanel * kDepthQK;
    for (int32_t n = 0; n < padded; n += kStepKV) {
      Base::PrefetchShare(kBlockKV / kStepKV * panels_);
      amx::Multiply32x32<false>(k_ + n * kDepthQK, kDepthQK, q, s_ + n * kPanel, kPanel, kDepthQK);
    }
  }

  /*!
   * Online softmax of logits S * scale into P. The state is rescaled only where a logit is far
   * above the maximum so far: sums and O are relative to the maximum that is kept, whatever it is.
   */
  void Softmax(int32_t panel, int32_t padded, float scale) {
    constexpr float kLog2e = 1.44269504088896341f;
    for (int j = 0; j < kPanelVectors; ++j) {
      const int32_t row = panel * kPanel + j * kLanes;
      const float* s = s_ + j * kLanes;
      BFloat16* pairs = p_pairs_ + j * kLanes * 2;
      if constexpr (!Variant::kSoftmax) {
        for (int32_t n = 0; n < padded; n += 2) {
          StorePairs(reinterpret_cast<BFloat16Pair*>(pairs + n * kPanel), Load(s + n * kPanel),
                     Load(s + (n + 1) * kPanel));
        }
        continue;
      }
      VFloat highest[4];
      for (int i = 0; i < 4; ++i) highest[i] = Load(s + i * kPanel);
      for (int32_t n = 4; n < padded; n += 4) {
        for (int i = 0; i < 4; ++i) highest[i] = Max(highest[i], Load(s + (n + i) * kPanel));
      }
      const VFloat block_max =
          Max(Max(highest[0], highest[1]), Max(highest[2], highest[3])) * scale;
      const VFloat old_max = Load(max_ + row);
      const VFloat max = Select(block_max > old_max + kSlack, block_max, old_max);
      // A row that has seen no visible key has max -inf: subtract 0 so that 2^-inf = 0.
      const VFloat safe = Select(max == -kInf, VFloat{}, max);
      const VInt moved = max != old_max;
      if (AnyLane(moved)) Rescale(panel, j, Exp(old_max - safe));
      const VFloat factor = Broadcast(scale * kLog2e), shift = safe * kLog2e;
      VFloat sum[2] = {};
      for (int32_t n = 0; n < padded; n += 2) {
        const VFloat even = amx::Exp2(Load(s + n * kPanel) * factor - shift);
        const VFloat odd = amx::Exp2(Load(s + (n + 1) * kPanel) * factor - shift);
        sum[0] += even;
        sum[1] += odd;
        StorePairs(reinterpret_cast<BFloat16Pair*>(pairs + n * kPanel), even, odd);
      }
      Store(max_ + row, max);
      Store(sum_ + row, Load(sum_ + row) + (sum[0] + sum[1]));
    }
  }

  static bool AnyLane(VInt mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }

  /*! Bring the sums and O of a vector of rows down to a new maximum. */
  void Rescale(int32_t panel, int j, VFloat factor) {
    float* sum = sum_ + panel * kPanel + j * kLanes;
    Store(sum, Load(sum) * factor);
    float* o = o_ + int64_t{panel} * kPanel * kDimVO + j * kLanes;
    for (int d = 0; d < kDimVO; ++d) Store(o + d * kPanel, Load(o + d * kPanel) * factor);
  }

  /*! O += V^T P */
  void Accumulate(int32_t panel, int32_t padded) {
    float* o = o_ + int64_t{panel} * kPanel * kDimVO;
    for (int d = 0; d < kDimVO; d += kStepKV) {
      const BFloat16* a = vt_ + int64_t{d} * kBlockKV;
      if (d + kStepKV <= kDimVO) {
        amx::Multiply32x32<true>(a, kBlockKV, p_pairs_, o + d * kPanel, kPanel, padded);
      } else {
        // The last rows of the tiles are no elements of the head: S is free by now, and as large.
        float* rows = s_;
        const int64_t bytes = (kDimVO - d) * kPanel * sizeof(float);
        std::memcpy(rows, o + d * kPanel, bytes);
        amx::Multiply32x32<true>(a, kBlockKV, p_pairs_, rows, kPanel, padded);
        std::memcpy(o + d * kPanel, rows, bytes);
      }
    }
  }

  using Base::item_;
  using Base::max_;
  using Base::o_;
  using Base::p_;
  using Base::panels_;
  using Base::sum_;
  BFloat16* q_;        //!< [panel][pair of elements][row][2]
  float* s_;           //!< [key][row]
  BFloat16* p_pairs_;  //!< [pair of keys][row][2]
  BFloat16* k_;        //!< [key][element], zeros past the head
  BFloat16* vt_;       //!< [element][key]
  BFloat16* v_;        //!< rows on their way to vt_, or zeros
  float* raw_ = nullptr;
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_AMX
#endif  // TVM_FLASHINFER_CPU_MANY_ROWS_AMX_H_
