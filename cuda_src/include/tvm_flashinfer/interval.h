// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Interval lanes: a variant's mask, evaluated once over ranges of positions instead of positions,
// tells whether a tile is empty, full or mixed. The mask is written once; its tile classes follow.
// Sound, not exact: an interval forgets how its operands are related, and then answers kMixed.
#ifndef TVM_FLASHINFER_INTERVAL_H_
#define TVM_FLASHINFER_INTERVAL_H_

#include <cstdint>

#include "variant.h"

namespace tvm_flashinfer {

/*! \brief Every integer in [lo, hi]. */
struct Interval {
  //! What is known of an integer that is not tracked, such as one loaded from a tensor.
  static constexpr int64_t kAny = int64_t{1} << 40;

  int64_t lo, hi;

  static TVM_FLASHINFER_HOST_DEVICE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
  static TVM_FLASHINFER_HOST_DEVICE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
  static TVM_FLASHINFER_HOST_DEVICE Interval Any() { return {-kAny, kAny}; }
  /*! Keep bounds small, so that no sum or product of two overflows. */
  static TVM_FLASHINFER_HOST_DEVICE Interval Of(int64_t lo, int64_t hi) {
    return lo < -kAny || hi > kAny ? Any() : Interval{lo, hi};
  }

  friend TVM_FLASHINFER_HOST_DEVICE Interval operator+(Interval a, Interval b) {
    return Of(a.lo + b.lo, a.hi + b.hi);
  }
  friend TVM_FLASHINFER_HOST_DEVICE Interval operator-(Interval a, Interval b) {
    return Of(a.lo - b.hi, a.hi - b.lo);
  }
  friend TVM_FLASHINFER_HOST_DEVICE Interval operator*(Interval a, Interval b) {
    constexpr int64_t kSmall = int64_t{1} << 31;  // the product fits 64 bits
    if (a.lo < -kSmall || a.hi > kSmall || b.lo < -kSmall || b.hi > kSmall) return Any();
    const int64_t p[4] = {a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi};
    Interval r{p[0], p[0]};
    for (int64_t x : p) r = {Min(r.lo, x), Max(r.hi, x)};
    return r;
  }
};

/*! \brief A float is not tracked. */
struct AnyFloat {
  friend TVM_FLASHINFER_HOST_DEVICE AnyFloat operator+(AnyFloat, AnyFloat) { return {}; }
  friend TVM_FLASHINFER_HOST_DEVICE AnyFloat operator-(AnyFloat, AnyFloat) { return {}; }
  friend TVM_FLASHINFER_HOST_DEVICE AnyFloat operator*(AnyFloat, AnyFloat) { return {}; }
  friend TVM_FLASHINFER_HOST_DEVICE AnyFloat operator/(AnyFloat, AnyFloat) { return {}; }
};

/*! \brief Unsigned integers wrap, so they are not tracked either. */
struct AnyUInt {
  friend TVM_FLASHINFER_HOST_DEVICE AnyUInt operator+(AnyUInt, AnyUInt) { return {}; }
  friend TVM_FLASHINFER_HOST_DEVICE AnyUInt operator-(AnyUInt, AnyUInt) { return {}; }
  friend TVM_FLASHINFER_HOST_DEVICE AnyUInt operator*(AnyUInt, AnyUInt) { return {}; }
};

/*! \brief The values a predicate may take over a tile. */
struct Possible {
  bool is_true, is_false;

  friend TVM_FLASHINFER_HOST_DEVICE Possible operator&(Possible a, Possible b) {
    return {a.is_true && b.is_true, a.is_false || b.is_false};
  }
  friend TVM_FLASHINFER_HOST_DEVICE Possible operator|(Possible a, Possible b) {
    return {a.is_true || b.is_true, a.is_false && b.is_false};
  }
};

TVM_FLASHINFER_HOST_DEVICE inline Possible operator<=(Interval a, Interval b) {
  return {a.lo <= b.hi, a.hi > b.lo};
}
TVM_FLASHINFER_HOST_DEVICE inline Possible operator<(Interval a, Interval b) {
  return {a.lo < b.hi, a.hi >= b.lo};
}
TVM_FLASHINFER_HOST_DEVICE inline Possible operator>=(Interval a, Interval b) { return b <= a; }
TVM_FLASHINFER_HOST_DEVICE inline Possible operator>(Interval a, Interval b) { return b < a; }
TVM_FLASHINFER_HOST_DEVICE inline Possible operator==(Interval a, Interval b) {
  const bool overlap = a.lo <= b.hi && b.lo <= a.hi;
  return {overlap, !(a.lo == a.hi && b.lo == b.hi && overlap)};
}
TVM_FLASHINFER_HOST_DEVICE inline Possible operator!=(Interval a, Interval b) {
  const Possible equal = a == b;
  return {equal.is_false, equal.is_true};
}
#define TVM_FLASHINFER_UNKNOWN_COMPARISON(op)                                  \
  TVM_FLASHINFER_HOST_DEVICE inline Possible operator op(AnyFloat, AnyFloat) { \
    return {true, true};                                                       \
  }
TVM_FLASHINFER_UNKNOWN_COMPARISON(<=)
TVM_FLASHINFER_UNKNOWN_COMPARISON(<)
TVM_FLASHINFER_UNKNOWN_COMPARISON(>=)
TVM_FLASHINFER_UNKNOWN_COMPARISON(>)
TVM_FLASHINFER_UNKNOWN_COMPARISON(==)
TVM_FLASHINFER_UNKNOWN_COMPARISON(!=)
#undef TVM_FLASHINFER_UNKNOWN_COMPARISON

/*! \brief The vocabulary of variants (see variant.h) over intervals. */
struct IntervalLanes {
  using Float = AnyFloat;
  using Int = Interval;
  using UInt = AnyUInt;
  using Mask = Possible;
  using Uniform = IntervalLanes;
  struct Vector {};

  template <typename T>
  static TVM_FLASHINFER_HOST_DEVICE T Splat(T x) {
    return x;
  }
  static TVM_FLASHINFER_HOST_DEVICE Float Element(Vector) { return {}; }
  static TVM_FLASHINFER_HOST_DEVICE Float Element(Vector, Int) { return {}; }
  static TVM_FLASHINFER_HOST_DEVICE Float F(float) { return {}; }
  static TVM_FLASHINFER_HOST_DEVICE Int I(int32_t x) { return {x, x}; }
  static TVM_FLASHINFER_HOST_DEVICE Mask B(bool x) { return {x, !x}; }
  static TVM_FLASHINFER_HOST_DEVICE Float ToFloat(Int) { return {}; }
  static TVM_FLASHINFER_HOST_DEVICE Int ToInt(Float) { return Interval::Any(); }
  static TVM_FLASHINFER_HOST_DEVICE Int ToInt(UInt) { return Interval::Any(); }
  static TVM_FLASHINFER_HOST_DEVICE UInt ToUInt(Int) { return {}; }
  static TVM_FLASHINFER_HOST_DEVICE Mask Not(Mask m) { return {m.is_false, m.is_true}; }
  static TVM_FLASHINFER_HOST_DEVICE Float Select(Mask, Float, Float) { return {}; }
  static TVM_FLASHINFER_HOST_DEVICE Int Select(Mask m, Int a, Int b) {
    if (!m.is_false) return a;
    if (!m.is_true) return b;
    return {Interval::Min(a.lo, b.lo), Interval::Max(a.hi, b.hi)};
  }
  static TVM_FLASHINFER_HOST_DEVICE Float Min(Float, Float) { return {}; }
  static TVM_FLASHINFER_HOST_DEVICE Float Max(Float, Float) { return {}; }
  static TVM_FLASHINFER_HOST_DEVICE Int Min(Int a, Int b) {
    return {Interval::Min(a.lo, b.lo), Interval::Min(a.hi, b.hi)};
  }
  static TVM_FLASHINFER_HOST_DEVICE Int Max(Int a, Int b) {
    return {Interval::Max(a.lo, b.lo), Interval::Max(a.hi, b.hi)};
  }
  static TVM_FLASHINFER_HOST_DEVICE Int FloorDiv(Int a, Int b) {
    if (b.lo != b.hi || b.lo <= 0) return Interval::Any();
    return {Floor(a.lo, b.lo), Floor(a.hi, b.lo)};
  }
  static TVM_FLASHINFER_HOST_DEVICE Int FloorMod(Int a, Int b) {
    if (b.lo != b.hi || b.lo <= 0) return Interval::Any();
    const int64_t period = Floor(a.lo, b.lo);
    if (period == Floor(a.hi, b.lo)) return {a.lo - period * b.lo, a.hi - period * b.lo};
    return {0, b.lo - 1};
  }
  static TVM_FLASHINFER_HOST_DEVICE Int ShiftRight(Int a, Int bits) {
    if (bits.lo != bits.hi || bits.lo < 0 || bits.lo > 31) return Interval::Any();
    return FloorDiv(a, {int64_t{1} << bits.lo, int64_t{1} << bits.lo});
  }
  static TVM_FLASHINFER_HOST_DEVICE Int ShiftLeft(Int, Int) { return Interval::Any(); }
  static TVM_FLASHINFER_HOST_DEVICE Int BitAnd(Int a, Int b) {
    // With a constant 2^n - 1 it is the rest of a division.
    if (b.lo == b.hi && b.lo >= 0 && (b.lo & (b.lo + 1)) == 0) {
      return FloorMod(a, {b.lo + 1, b.lo + 1});
    }
    if (b.lo >= 0) return {0, b.hi};
    return a.lo >= 0 ? Int{0, a.hi} : Interval::Any();
  }
  static TVM_FLASHINFER_HOST_DEVICE Int BitOr(Int, Int) { return Interval::Any(); }
  static TVM_FLASHINFER_HOST_DEVICE Int BitXor(Int, Int) { return Interval::Any(); }
#define TVM_FLASHINFER_UNTRACKED_LOAD(fn, type, value) \
  static TVM_FLASHINFER_HOST_DEVICE type fn(const VariantArg&, Int) { return value; }
  TVM_FLASHINFER_UNTRACKED_LOAD(LoadFloat, Float, {})
  TVM_FLASHINFER_UNTRACKED_LOAD(LoadFloat16, Float, {})
  TVM_FLASHINFER_UNTRACKED_LOAD(LoadBFloat16, Float, {})
  TVM_FLASHINFER_UNTRACKED_LOAD(LoadInt, Int, Interval::Any())
  TVM_FLASHINFER_UNTRACKED_LOAD(LoadInt8, Int, (Int{-128, 127}))
  TVM_FLASHINFER_UNTRACKED_LOAD(LoadUInt8, Int, (Int{0, 255}))
  TVM_FLASHINFER_UNTRACKED_LOAD(LoadBool, Mask, (Mask{true, true}))
#undef TVM_FLASHINFER_UNTRACKED_LOAD
#define TVM_FLASHINFER_UNTRACKED(fn) \
  static TVM_FLASHINFER_HOST_DEVICE Float fn(Float) { return {}; }
  TVM_FLASHINFER_UNTRACKED(Exp)
  TVM_FLASHINFER_UNTRACKED(Exp2)
  TVM_FLASHINFER_UNTRACKED(Log)
  TVM_FLASHINFER_UNTRACKED(Tanh)
  TVM_FLASHINFER_UNTRACKED(Sigmoid)
  TVM_FLASHINFER_UNTRACKED(Sqrt)
  TVM_FLASHINFER_UNTRACKED(Abs)
  TVM_FLASHINFER_UNTRACKED(Sin)
  TVM_FLASHINFER_UNTRACKED(Cos)
  TVM_FLASHINFER_UNTRACKED(SinWithinTurn)
  TVM_FLASHINFER_UNTRACKED(CosWithinTurn)
#undef TVM_FLASHINFER_UNTRACKED

 private:
  static TVM_FLASHINFER_HOST_DEVICE int64_t Floor(int64_t a, int64_t b) {
    return a >= 0 ? a / b : -((b - 1 - a) / b);
  }
};

/*! \brief Interval lanes that also watch whether a tensor parameter is indexed past its end. */
struct BoundsLanes : IntervalLanes {
  using Uniform = BoundsLanes;

  //! The first parameter whose index may lie outside, since it was last cleared. Host only.
  static const VariantArg*& Violated() {
    static thread_local const VariantArg* violated = nullptr;
    return violated;
  }
#define TVM_FLASHINFER_WATCHED_LOAD(fn)              \
  static auto fn(const VariantArg& arg, Int index) { \
    Watch(arg, index);                               \
    return IntervalLanes::fn(arg, index);            \
  }
  TVM_FLASHINFER_WATCHED_LOAD(LoadFloat)
  TVM_FLASHINFER_WATCHED_LOAD(LoadFloat16)
  TVM_FLASHINFER_WATCHED_LOAD(LoadBFloat16)
  TVM_FLASHINFER_WATCHED_LOAD(LoadInt)
  TVM_FLASHINFER_WATCHED_LOAD(LoadInt8)
  TVM_FLASHINFER_WATCHED_LOAD(LoadUInt8)
  TVM_FLASHINFER_WATCHED_LOAD(LoadBool)
#undef TVM_FLASHINFER_WATCHED_LOAD

 private:
  static void Watch(const VariantArg& arg, Int index) {
    int64_t size = 1;
    for (int32_t extent : arg.extent) size *= extent;
    if ((index.lo < 0 || index.hi >= size) && Violated() == nullptr) Violated() = &arg;
  }
};

/*! \brief Ranges over everything that a plan visits. */
struct VisitedRange {
  ElementIndex<Interval> elements;
  Interval q_rows;      //!< rows of q
  Interval kv_slots;    //!< places in the pool, page * page_size + offset
  bool stores = false;  //!< not a run, but new keys and values on their way into the pool
};

/*!
 * \brief Index of a parameter that V may read past its end when elements lie in `at`, or -1.
 *
 * Loads happen for masked elements too, for lanes share them. Elements of heads are tried one by
 * one: what is written with them (halves, pairs) says little about a range of them.
 */
template <typename V, int kDimQK, int kDimVO>
int32_t FindOutOfBoundsParam(const VariantArgs& args, const VisitedRange& at) {
  using L = BoundsLanes;
  const ElementIndex<Interval>& e = at.elements;
  L::Violated() = nullptr;
  if (!at.stores) {
    if constexpr (V::kHasLogits) V::template Logits<L>(args, AnyFloat{}, e);
    if constexpr (V::kHasMask) V::template Mask<L>(args, e);
    if constexpr (V::kHasSink) V::template Sink<L>(args, e);
  }
  for (int64_t d = 0; d < (kDimQK > kDimVO ? kDimQK : kDimVO); ++d) {
    const Interval dim{d, d}, none = Interval::Any();
    [[maybe_unused]] const VectorIndex<L> q{e.request, e.q_idx,   e.q_head,
                                            e.kv_head, at.q_rows, dim};
    [[maybe_unused]] const VectorIndex<L> kv{none, e.kv_idx, none, e.kv_head, at.kv_slots, dim};
    if (at.stores) {
      if constexpr (V::kHasStoreKey) {
        if (d < kDimQK) V::template StoreKey<L>(args, {}, kv);
      }
      if constexpr (V::kHasStoreValue) {
        if (d < kDimVO) V::template StoreValue<L>(args, {}, kv);
      }
      continue;
    }
    if (d < kDimQK) {
      if constexpr (V::kHasQuery) V::template Query<L>(args, {}, q);
      if constexpr (V::kHasKey) V::template Key<L>(args, {}, kv);
    }
    if (d < kDimVO) {
      if constexpr (V::kHasValue) V::template Value<L>(args, {}, kv);
      if constexpr (V::kHasOutput) V::template Output<L>(args, {}, q);
    }
  }
  const VariantArg* violated = L::Violated();
  return violated == nullptr ? -1 : static_cast<int32_t>(violated - args.arg);
}

/*! \brief Class of a tile under V's mask, from the ranges of its positions. */
template <typename V>
TVM_FLASHINFER_HOST_DEVICE TileClass ClassifyByIntervals(const typename V::Params& params,
                                                         const TileRange& r) {
  if constexpr (!V::kHasMask) return TileClass::kFull;
  // A tile may span requests and heads.
  const Interval any_index{0, INT32_MAX};
  const ElementIndex<Interval> at{
      any_index, {r.q_lo, r.q_hi}, {r.kv_lo, r.kv_hi}, any_index, any_index};
  const Possible visible = V::template Mask<IntervalLanes>(params, at);
  if (!visible.is_true) return TileClass::kEmpty;
  return visible.is_false ? TileClass::kMixed : TileClass::kFull;
}

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_INTERVAL_H_
