// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// A variant's transforms of head vectors: rows become float32 in a buffer that stays in the first
// cache levels, transformed on the way, so that memory is read once.
#ifndef TVM_FLASHINFER_CPU_ROW_TRANSFORM_H_
#define TVM_FLASHINFER_CPU_ROW_TRANSFORM_H_

#include <cstdint>

#include "../variant.h"
#include "simd_lanes.h"

namespace tvm_flashinfer {
namespace cpu {

/*! \brief Elements of a row in whole vectors. */
template <int kDim>
inline constexpr int kPaddedDim = (kDim + kLanes - 1) / kLanes * kLanes;

using RowIndex = VectorIndex<SimdLanes>;

/*! \brief to[0, kPaddedDim<kDim>) = from as float32; zeros past its end. */
template <int kDim, typename T>
inline void RowToFloat(const T* from, float* to) {
  for (int d = 0; d < kPaddedDim<kDim>; d += kLanes) Store(to + d, LoadRow<kDim>(from, d));
}

/*!
 * \brief to[d] = transform(from)[d]; zeros past the end.
 * \param from, to kPaddedDim<kDim> elements each, apart.
 * \param transform Callable (SimdLanes::Vector, RowIndex) -> VFloat.
 */
template <int kDim, typename Transform>
inline void TransformRow(const float* from, RowIndex at, const Transform& transform, float* to) {
  for (int d = 0; d < kPaddedDim<kDim>; d += kLanes) {
    const VInt dim = Iota() + d;
    // Lanes past the end repeat the last element: a variant may index a tensor with it.
    at.dim = SimdLanes::Min(dim, Broadcast(kDim - 1));
    VFloat y = transform(SimdLanes::Vector{from, kDim - 1, d}, at);
    if (d + kLanes > kDim) y = Select(dim < kDim, y, VFloat{});
    Store(to + d, y);
  }
}

/*!
 * \brief A query row as float32, transformed by the variant.
 * \param buffer 2 * kPaddedDim<kDim> floats.
 * \return Where in the buffer it is; zeros past its end.
 */
template <int kDim, typename Variant, typename TQ>
inline const float* QueryRow(const TQ* from, const typename Variant::Params& variant,
                             const RowIndex& at, float* buffer) {
  RowToFloat<kDim>(from, buffer);
  if constexpr (Variant::kHasQuery) {
    float* to = buffer + kPaddedDim<kDim>;
    TransformRow<kDim>(
        buffer, at,
        [&](const auto& x, const auto& i) {
          return Variant::template Query<SimdLanes>(variant, x, i);
        },
        to);
    return to;
  }
  return buffer;
}

/*!
 * \brief Rows of keys or values as float32, transformed by `transform`.
 * \param at Of the first of them; those that follow are at the next positions.
 * \param slots Their places in the pool.
 * \param block count rows of kPaddedDim<kDim> floats, and a row of scratch after them.
 * \param rows Pointed at the results.
 */
template <int kDim, typename TKV, typename Transform>
inline void TransformBlock(const TKV* const* source, int32_t count, RowIndex at,
                           const int32_t* slots, const Transform& transform, float* block,
                           const float** rows) {
  float* raw = block + int64_t{count} * kPaddedDim<kDim>;
  const int32_t first = at.position;
  for (int32_t i = 0; i < count; ++i) {
    float* to = block + i * kPaddedDim<kDim>;
    at.position = first + i;
    at.row = slots[i];
    RowToFloat<kDim>(source[i], raw);
    TransformRow<kDim>(raw, at, transform, to);
    rows[i] = to;
  }
}

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_ROW_TRANSFORM_H_
