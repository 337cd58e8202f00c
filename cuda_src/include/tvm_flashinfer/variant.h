// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Attention variants: what is computed per (query, key) element, and per element of a head. A
// variant is written once, over a `Lanes` type: SIMD vectors on a CPU, scalars in a CUDA thread.
// Kernels take any struct that derives from VariantDefaults and has the members that it announces;
// the Python side generates such structs from expressions.
#ifndef TVM_FLASHINFER_VARIANT_H_
#define TVM_FLASHINFER_VARIANT_H_

#include <cstdint>

#include "plan.h"

namespace tvm_flashinfer {

/*! \brief Where an element stands. `I` is an integer, or a SIMD vector of them. */
template <typename I>
struct ElementIndex {
  I request;  //!< request (batch) index
  I q_idx;    //!< position of the query in its request; bottom-right aligned by default
  I kv_idx;   //!< position of the key in its request
  I q_head;
  I kv_head;
};

/*!
 * \brief Where an element of one head vector stands: of a query or an output, or of a key or a
 * value (which know no request, query or query head, for every query of a tile reads them).
 *
 * The vector's own place is the same in all lanes, so that what depends on it alone is computed
 * once a vector, in `Lanes::Uniform`.
 */
template <typename Lanes>
struct VectorIndex {
  using Uniform = typename Lanes::Uniform::Int;
  Uniform request;
  Uniform position;  //!< of the query or key in its request
  Uniform q_head;
  Uniform kv_head;
  Uniform row;              //!< of a query: its row of q; of a key: page * page_size + offset
  typename Lanes::Int dim;  //!< element of the head
};

/*! \brief A parameter of a generated variant: a scalar, or a dense row-major tensor. */
struct VariantArg {
  static constexpr int32_t kMaxDims = 4;

  union {
    float f;
    int32_t i;
    const void* data;
  };
  int32_t extent[kMaxDims];  //!< of a tensor; 1 past its axes
};

/*! \brief Parameters of a generated variant, in the order it declares them. */
struct VariantArgs {
  static constexpr int32_t kMaxArgs = 8;
  VariantArg arg[kMaxArgs];
};

/*! \brief Element types of parameters; values are part of the kernel interface. */
enum class VariantType : int32_t {
  kFloat32 = 0,
  kInt32 = 1,
  kBool = 2,
  kFloat16 = 3,
  kBFloat16 = 4,
  kInt8 = 5,
  kUInt8 = 6
};

/*! \brief A parameter as a generated variant declares it. */
struct VariantParam {
  const char* name;
  VariantType type;
  int32_t num_dims;  //!< 0: a scalar
};

/*! \brief What a mask does to a tile of queries x keys. */
enum class TileClass : int32_t {
  kEmpty,  //!< hides every element: skip the tile
  kFull,   //!< hides none: don't evaluate the mask
  kMixed
};

/*! \brief Inclusive ranges of positions that a tile spans. */
struct TileRange {
  int32_t q_lo, q_hi, kv_lo, kv_hi;
};

/*!
 * \brief What a variant does unless it says otherwise: softmax over plain logits.
 *
 * A variant that sets a flag has the member function of that name, over any `Lanes`:
 *
 *   kHasLogits  Float Logits(params, Float x, ElementIndex)       logit of a scaled product
 *   kHasMask    Mask Mask(params, ElementIndex)                   whether the key is visible
 *   kHasSink    Float Sink(params, ElementIndex)                  logit of one more key, of value 0
 *   kHasQuery   Float Query(params, Vector x, VectorIndex)        element of the query, before the
 *                                                                 scale
 *   kHasKey, kHasValue    the same of a key and of a value, as they leave the pool
 *   kHasOutput  Float Output(params, Vector x, VectorIndex)       element of the normalised output
 *   kHasStoreKey, kHasStoreValue    of a new key or value, on its way into the pool
 *
 * Without kSoftmax a logit is the weight of its value, hidden keys weigh 0, nothing is normalised
 * and there is no LSE.
 */
struct VariantDefaults {
  static constexpr bool kHasLogits = false;
  static constexpr bool kHasMask = false;
  static constexpr bool kHasSink = false;
  static constexpr bool kHasQuery = false;
  static constexpr bool kHasKey = false;
  static constexpr bool kHasValue = false;
  static constexpr bool kHasOutput = false;
  static constexpr bool kHasStoreKey = false;
  static constexpr bool kHasStoreValue = false;
  static constexpr bool kSoftmax = true;

  /*!
   * What Key reads, so that a kernel can keep a key in registers. -1: any of its elements; 0:
   * element d alone; P: also, of an element below kKeyPaired, the one P away in its block of 2 P
   * elements.
   */
  static constexpr int32_t kKeyPartner = -1;
  static constexpr int32_t kKeyPaired = 0;

  //! Kernels ask for the mask of mixed tiles, which none is without kHasMask.
  template <typename Lanes, typename Params>
  TVM_FLASHINFER_HOST_DEVICE static typename Lanes::Mask Mask(
      const Params&, const ElementIndex<typename Lanes::Int>&) {
    return Lanes::B(true);
  }
};

/*! \brief Parameters of every StandardVariant; a variant reads those it is compiled with. */
struct StandardVariantParams {
  int32_t window_left = 0;
  int32_t attention_sink = 0;
  float soft_cap = 1.0f;
};

/*!
 * \brief Softmax attention with an optional causal mask, sliding window and logits soft-cap.
 * \tparam kCausal A key is visible from its own position on.
 * \tparam kWindow A query sees `window_left` keys before itself, and the first `attention_sink`.
 * \tparam kSoftCap Logits become cap * tanh(x / cap) (Gemma 2).
 */
template <bool kCausal, bool kWindow = false, bool kSoftCap = false>
struct StandardVariant : VariantDefaults {
  using Params = StandardVariantParams;
  static constexpr bool kHasMask = kCausal || kWindow;
  static constexpr bool kHasLogits = kSoftCap;

  /*! \param x Logits, scaled already. */
  template <typename Lanes>
  TVM_FLASHINFER_HOST_DEVICE static typename Lanes::Float Logits(
      const Params& p, typename Lanes::Float x, const ElementIndex<typename Lanes::Int>&) {
    if constexpr (kSoftCap) return Lanes::Tanh(x * (1.0f / p.soft_cap)) * p.soft_cap;
    return x;
  }

  /*! \return true (lane-wise) where the key is visible. */
  template <typename Lanes>
  TVM_FLASHINFER_HOST_DEVICE static typename Lanes::Mask Mask(
      const Params& p, const ElementIndex<typename Lanes::Int>& at) {
    typename Lanes::Mask visible = Lanes::B(true);
    if constexpr (kCausal) visible = visible & (at.kv_idx <= at.q_idx);
    if constexpr (kWindow) {
      visible =
          visible & ((at.kv_idx >= at.q_idx - p.window_left) | (at.kv_idx < p.attention_sink));
    }
    return visible;
  }

  TVM_FLASHINFER_HOST_DEVICE static TileClass Classify(const Params& p, const TileRange& r) {
    bool full = true;
    if constexpr (kCausal) {
      if (r.kv_lo > r.q_hi) return TileClass::kEmpty;
      full = full && r.kv_hi <= r.q_lo;
    }
    if constexpr (kWindow) {
      const bool in_sink = r.kv_lo < p.attention_sink;
      if (!in_sink && r.kv_hi < r.q_lo - p.window_left) return TileClass::kEmpty;
      full = full && (r.kv_lo >= r.q_hi - p.window_left || r.kv_hi < p.attention_sink);
    }
    return full ? TileClass::kFull : TileClass::kMixed;
  }
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_VARIANT_H_
