// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The CPU path for many packed rows (prefill, append, large GQA groups): lanes are query rows.
//
// Queries are packed once per item as panels [head_dim][kPanel], so that S = K Q and O = V P are
// the same register-blocked product: vectors run along query rows, and elements of K and V are
// broadcast straight from their pages.
//
// Where the CPU multiplies pairs of bfloat16 (AVX512-BF16) and queries are of that type, the words
// that are broadcast and multiplied are such pairs: of a head's elements in S = K Q, of two keys in
// O = V P.
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
    return Base::BaseFloats(max_rows) + int64_t{Base::Panels(max_rows)} * kPanel * kWordsQK +
           (kBlockKV + kBlockRows) * kPanel + (kConvertK ? kBlockFloats<kDimQK> : 0) +
           (kConvertV ? kBlockFloats<kDimVO> : 0) + (kPairs ? kBlockKV / 2 * kDimVO : 0);
  }

  static void Run(const AttentionParams& p, const WorkItem& item, float* scratch) {
    ManyRows(p, item, scratch).Run();
  }

 private:
  using Base::kPanel;
  using Base::kPanelVectors;
  //! With kPanelVectors accumulators each, they fill the registers.
  static constexpr int kBlockRows = kRegisters == 32 ? 8 : 6;
  static constexpr bool kPairs = kBf16Dot && std::is_same_v<TQ, BFloat16>;
  //! What is broadcast and multiplied, of kDepth elements.
  using Element = std::conditional_t<kPairs, BFloat16, float>;
  using Word = std::conditional_t<kPairs, BFloat16Pair, float>;
  static constexpr int kDepth = kPairs ? 2 : 1;
  static_assert(kDimQK % kDepth == 0 && kBlockKV % kDepth == 0, "words are whole");
  static constexpr int kWordsQK = kDimQK / kDepth;
  //! Whether rows are read from a block of scratch, not in their pages.
  static constexpr bool kConvertK = !std::is_same_v<TKV, Element> || Variant::kHasKey;
  static constexpr bool kConvertV = !std::is_same_v<TKV, Element> || Variant::kHasValue;
  using VWords = std::conditional_t<kPairs, VInt, VFloat>;
  template <int kDim>
  static constexpr int kBlockFloats = (kBlockKV + 1) * kPaddedDim<kDim>;

  ManyRows(const AttentionParams& p, const WorkItem& item, float* scratch)
      : Base(p, item, scratch) {
    q_ = reinterpret_cast<Word*>(Base::Take(int64_t{panels_} * kPanel * kWordsQK));
    s_ = Base::Take((kBlockKV + kBlockRows) * kPanel);
    if constexpr (kConvertK) k_block_ = Base::Take(kBlockFloats<kDimQK>);
    if constexpr (kConvertV) v_block_ = Base::Take(kBlockFloats<kDimVO>);
    if constexpr (kPairs) v_pairs_ = reinterpret_cast<Word*>(Base::Take(kBlockKV / 2 * kDimVO));
  }

  void Run() {
    // Pairs are multiplied as they are, and their logits scaled: a scaled query would be rounded.
    const float q_scale = kPairs ? 1.0f : p_.sm_scale;
    Base::template LoadQueries<kPairs>([&](int32_t row, const auto* query) {
      Word* to = q_ + int64_t{row / kPanel} * kPanel * kWordsQK + row % kPanel;
      for (int w = 0; w < kWordsQK; ++w) {
        if constexpr (kPairs) {
          to[w * kPanel] = {AsElement(query[2 * w]), AsElement(query[2 * w + 1])};
        } else {
          to[w * kPanel] = query[w] * q_scale;
        }
      }
    });
    const KVRows<TKV> k_rows(p_.k, p_.k_strides, p_, item_);
    const KVRows<TKV> v_rows(p_.v, p_.v_strides, p_, item_);
    Base::ForEachBlock(k_rows, v_rows, [&](const Block& block, bool masked) {
      const int32_t count = block.count;
      const Element* k[kBlockKV + kBlockRows];
      const Element* v[kBlockKV];
      if constexpr (Variant::kHasKey) {
        const float* rows[kBlockKV];
        Base::TransformKeys(block, k_rows, k_block_, rows);
        Narrow<kDimQK>(rows, count, k);
      } else {
        LoadBlock<kDimQK>(block.k, count, k_block_, k);
      }
      if constexpr (Variant::kHasValue) {
        const float* rows[kBlockKV];
        Base::TransformValues(block, v_rows, v_block_, rows);
        Narrow<kDimVO>(rows, count, v);
      } else {
        LoadBlock<kDimVO>(block.v, count, v_block_, v);
      }
      // Rows past the end repeat the last one: their logits are never read.
      for (int32_t i = 0; i < kBlockRows; ++i) k[count + i] = k[count - 1];
      const Word* values[kBlockKV];
      ValueWords(v, count, values);
      const int32_t words = (count + kDepth - 1) / kDepth;
      for (int32_t panel = 0; panel < panels_; ++panel) {
        Scores(panel, k, count);
        if (Variant::kHasLogits || masked) {
          Base::Transform(panel, block.position, count, masked, 1.0f, s_);
        }
        VFloat rescale[kPanelVectors];
        Softmax(panel, count, rescale);
        Accumulate(panel, values, words, rescale);
      }
    });
    Base::WriteStates();
  }

  static BFloat16 AsElement(BFloat16 x) { return x; }
  static BFloat16 AsElement(float x) { return FromFloat<BFloat16>(x); }

  /*! Point rows at a block's tokens as elements: in their pages, or converted into `block`. */
  template <int kDim>
  static void LoadBlock(const TKV* const* source, int32_t count, float* block,
                        const Element** rows) {
    if constexpr (std::is_same_v<TKV, Element>) {
      std::copy_n(source, count, rows);
    } else {
      const float* floats[kBlockKV];
      for (int32_t i = 0; i < count; ++i) {
        floats[i] = block + i * kPaddedDim<kDim>;
        RowToFloat<kDim>(source[i], block + i * kPaddedDim<kDim>);
      }
      Narrow<kDim>(floats, count, rows);
    }
  }

  /*! Rows of a block of scratch as elements, in place. */
  template <int kDim>
  static void Narrow(const float* const* floats, int32_t count, const Element** rows) {
    for (int32_t i = 0; i < count; ++i) {
      rows[i] = reinterpret_cast<const Element*>(floats[i]);
      if constexpr (kPairs) {
        auto* to = reinterpret_cast<char*>(const_cast<float*>(floats[i]));
        for (int d = 0; d < kDim; ++d) {
          const Element x = FromFloat<Element>(floats[i][d]);
          std::memcpy(to + d * sizeof(Element), &x, sizeof(x));
        }
      }
    }
  }

  /*! Rows of words of values: as they are, or two keys' together; a key past the end weighs 0. */
  void ValueWords(const Element* const* v, int32_t count, const Word** words) {
    if constexpr (kPairs) {
      for (int32_t n = 0; n < count; n += 2) {
        const Element* first = v[n];
        const Element* second = v[std::min(n + 1, count - 1)];
        Word* to = v_pairs_ + n / 2 * kDimVO;
        for (int d = 0; d < kDimVO; ++d) to[d] = {first[d], second[d]};
        words[n / 2] = to;
      }
    } else {
      std::copy_n(v, count, words);
    }
  }

  /*! S[n][row] = K[n] . Q[row], scaled. */
  void Scores(int32_t panel, const Element* const* k, int32_t count) {
    constexpr int kSteps = (kBlockKV + kBlockRows - 1) / kBlockRows;
    const Word* q = q_ + int64_t{panel} * kPanel * kWordsQK;
    for (int32_t n = 0; n < count; n += kBlockRows) {
      Base::PrefetchShare(kSteps * panels_);
      VFloat acc[kBlockRows][kPanelVectors] = {};
      const Word* row[kBlockRows];
      for (int i = 0; i < kBlockRows; ++i) row[i] = reinterpret_cast<const Word*>(k[n + i]);
      for (int w = 0; w < kWordsQK; ++w) MultiplyAdd<kBlockRows>(row, w, q + w * kPanel, acc);
      for (int i = 0; i < kBlockRows; ++i) {
        for (int j = 0; j < kPanelVectors; ++j) {
          const VFloat s = kPairs ? acc[i][j] * p_.sm_scale : acc[i][j];
          Store(s_ + (n + i) * kPanel + j * kLanes, s);
        }
      }
    }
  }

  /*! acc[i][row] += row[i][at] * lanes[row] */
  template <int kRows>
  static void MultiplyAdd(const Word* const* row, int at, const Word* lanes,
                          VFloat (&acc)[kRows][kPanelVectors]) {
    VWords x[kPanelVectors];
    for (int j = 0; j < kPanelVectors; ++j) x[j] = LoadWords(lanes + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const VWords y = BroadcastWord(row[i][at]);
      for (int j = 0; j < kPanelVectors; ++j) acc[i][j] = Dot(acc[i][j], y, x[j]);
    }
  }

  /*! Online softmax (Milakov and Gimelshein, 2018): S becomes P; returns the old state's factor. */
  void Softmax(int32_t panel, int32_t count, VFloat* rescale) {
    if constexpr (kPairs) {  // a key past the end, which completes the last pair, weighs nothing
      constexpr float kPast = Variant::kSoftmax ? -kInf : 0.0f;
      if (count % 2 != 0) std::fill_n(s_ + count * kPanel, kPanel, kPast);
    }
    if constexpr (!Variant::kSoftmax) {
      std::fill_n(rescale, kPanelVectors, Broadcast(1.0f));
      for (int j = 0; j < kPanelVectors && kPairs; ++j) {
        StoreWeights(j, count, [](VFloat x) { return x; });
      }
      return;
    }
    for (int j = 0; j < kPanelVectors; ++j) {
      const int32_t row = panel * kPanel + j * kLanes;
      const VFloat old_max = Load(max_ + row);
      VFloat max = old_max;
      for (int32_t n = 0; n < count; ++n) max = Max(max, Load(s_ + n * kPanel + j * kLanes));
      // A row that has seen no visible key has max -inf: subtract 0 so that exp(-inf) = 0.
      const VFloat safe = Select(max == -kInf, VFloat{}, max);
      rescale[j] = ExpOfWeight(old_max - safe);
      VFloat sum = VFloat{};
      StoreWeights(j, count, [&](VFloat x) {
        const VFloat e = ExpOfWeight(x - safe);
        sum += e;
        return e;
      });
      Store(max_ + row, max);
      Store(sum_ + row, Load(sum_ + row) * rescale[j] + sum);
    }
  }

  /*! Replace logits of a vector of rows by words of weights, [word][row]. */
  template <typename Weight>
  void StoreWeights(int j, int32_t count, const Weight& weight) {
    for (int32_t n = 0; n < count; n += kDepth) {
      const float* s = s_ + n * kPanel + j * kLanes;
      const VFloat first = weight(Load(s));
      if constexpr (kPairs) {  // in place: words take half the room
        StorePairs(Weights() + n / 2 * kPanel + j * kLanes, first, weight(Load(s + kPanel)));
      } else {
        Store(Weights() + n * kPanel + j * kLanes, first);
      }
    }
  }
  Word* Weights() { return reinterpret_cast<Word*>(s_); }

  /*! O = O * rescale + V^T P */
  void Accumulate(int32_t panel, const Word* const* v, int32_t words, const VFloat* rescale) {
    float* o = o_ + int64_t{panel} * kPanel * kDimVO;
    int d = 0;
    for (; d + kBlockRows <= kDimVO; d += kBlockRows) {
      AccumulateRows<kBlockRows>(v, words, d, rescale, o);
    }
    constexpr int kTail = kDimVO % kBlockRows;
    if constexpr (kTail > 0) AccumulateRows<kTail>(v, words, d, rescale, o);
  }

  template <int kRows>
  void AccumulateRows(const Word* const* v, int32_t words, int d, const VFloat* rescale, float* o) {
    VFloat acc[kRows][kPanelVectors] = {};
    for (int32_t n = 0; n < words; ++n) {
      const Word* row[kRows];
      for (int i = 0; i < kRows; ++i) row[i] = v[n] + d + i;
      MultiplyAdd<kRows>(row, 0, Weights() + n * kPanel, acc);
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
  Word* q_;   //!< [panel][word][row]
  float* s_;  //!< logits [key][row], then words of weights [word][row]
  Word* v_pairs_ = nullptr;
  float *k_block_ = nullptr, *v_block_ = nullptr;
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_MANY_ROWS_H_
