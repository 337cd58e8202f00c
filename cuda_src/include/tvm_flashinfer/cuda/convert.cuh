// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Rows of keys and values on their way from the ring to the matrix products: narrow numbers are
// widened to the operand type, and the variant's transforms applied, once for all queries of the
// tile. Where nothing is to be done, or it is done in registers (narrow_operands.cuh,
// key_fragments.cuh), products read the ring itself.
#ifndef TVM_FLASHINFER_CUDA_CONVERT_CUH_
#define TVM_FLASHINFER_CUDA_CONVERT_CUH_

#include "../variant.h"
#include "block_layout.cuh"
#include "lanes.cuh"
#include "launch_params.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief A row as the pool has it: index -> element as float32. */
template <typename Pool>
struct RawRow {
  const uint8_t* row;

  __device__ __forceinline__ float operator()(int i) const {
    if constexpr (std::is_same_v<Pool, Int4>) {
      const int bits = row[i / 2] >> (i % 2 * 4) & 15;
      return static_cast<float>((bits ^ 8) - 8);
    } else {
      return ptx::ToFloat(reinterpret_cast<const Pool*>(row)[i]);
    }
  }

  /*! \brief Elements [4 i, 4 i + 4). */
  __device__ __forceinline__ void Quad(int i, float (&x)[4]) const {
    if constexpr (std::is_same_v<Pool, Float8E4M3> || std::is_same_v<Pool, Float8E5M2>) {
      ptx::ToFloat4<Pool>(reinterpret_cast<const uint32_t*>(row)[i], x);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = (*this)(4 * i + e);
    }
  }
};

/*! \brief Place of a chunk's token in the pool: page * page_size + offset. */
__device__ __forceinline__ int32_t PoolRow(const LaunchParams& p, const WorkItem& item, int token) {
  const int at = item.kv_begin + token;
  const int page = p.page.Divide(at);
  return p.plan.Pages(item.level, item.row)[page] * p.page_size + at - page * p.page_size;
}

/*! \brief Threads that convert a range of a stage's rows together, for their own use. */
template <typename C>
struct Converters {
  int first_row, rows;
  int thread, threads;
  int slice;

  __device__ __forceinline__ explicit Converters(const BlockLayout<C>& at) : slice(at.slice) {
    if constexpr (C::kWide) {
      first_row = 0;
      rows = C::kStepKV;
      thread = at.thread;
      threads = C::kConsumerThreads;
    } else {
      first_row = at.slice * C::kSliceKV;
      rows = C::kSliceKV;
      thread = at.warp_q * kWarpSize + at.lane;
      threads = C::kWarpsQ * kWarpSize;
    }
  }
  __device__ __forceinline__ void Sync() const {
    if constexpr (C::kWide) {
      Pipeline<C>::SyncConsumers();
    } else if constexpr (C::kWarpsQ == 1) {
      __syncwarp();
    } else {
      ptx::NamedBarrier(2 + slice, C::kWarpsQ * kWarpSize);
    }
  }
};

/*!
 * \brief Where the products of one item read keys and values.
 *
 * Every thread of its Converters calls K, then V, of the same stages. The converted tile is a
 * single one: with both operands converted, the barrier between the conversions of one tells that
 * all products of the other are done.
 */
template <typename C, typename Variant>
class OperandTiles {
 public:
  using Form = typename C::Form;
  using VariantParams = typename Variant::Params;

  __device__ __forceinline__ OperandTiles(const LaunchParams& p, const VariantParams& variant,
                                          const Pipeline<C>& pipeline, const BlockLayout<C>& at)
      : p_(p), variant_(variant), pipeline_(pipeline), converters_(at) {}

  /*! \brief Keys of a step, which are in the slot. */
  __device__ __forceinline__ uint32_t K(const ItemInfo& info, int step, int slot) const {
    if constexpr (!C::kConvertK) return pipeline_.K(slot);
    if constexpr (!C::kConvertV) converters_.Sync();
    Convert<C::kHeadDimQK, typename C::KRing, typename C::KTile, Variant::kHasKey>(
        info, step, pipeline_.K(slot), C::kOperandOffset, [&](const auto& x, const auto& at) {
          using Lanes = VectorLanes<RawRow<typename C::Pool>>;
          if constexpr (Variant::kHasKey) return Variant::template Key<Lanes>(variant_, x, at);
          return 0.0f;
        });
    converters_.Sync();
    return pipeline_.base + C::kOperandOffset;
  }

  /*! \brief Values of a step, likewise. */
  __device__ __forceinline__ uint32_t V(const ItemInfo& info, int step, int slot) const {
    if constexpr (Form::kSharedKV) {
      return C::kConvertK ? pipeline_.base + C::kOperandOffset : pipeline_.K(slot);
    }
    if constexpr (!C::kConvertV) return pipeline_.V(slot);
    constexpr int kOffset = C::kOperandOffset + C::kOperandKBytes;
    if constexpr (!C::kConvertK) converters_.Sync();
    Convert<C::kHeadDimVO, typename C::VRing, typename C::VTile, Variant::kHasValue>(
        info, step, pipeline_.V(slot), kOffset, [&](const auto& x, const auto& at) {
          using Lanes = VectorLanes<RawRow<typename C::Pool>>;
          if constexpr (Variant::kHasValue) return Variant::template Value<Lanes>(variant_, x, at);
          return 0.0f;
        });
    converters_.Sync();
    return pipeline_.base + kOffset;
  }

 private:
  template <int kDim, typename Ring, typename Tile, bool kTransform, typename F>
  __device__ __forceinline__ void Convert(const ItemInfo& info, int step, uint32_t ring,
                                          int operand, F transform) const {
    using T = typename C::T;
    using Lanes = VectorLanes<RawRow<typename C::Pool>>;
    constexpr int kQuads = kDim / 4;
    struct alignas(8) Packed {
      uint32_t x[2];
    };
    const uint8_t* from = pipeline_.smem + (ring - pipeline_.base);
    uint8_t* to = pipeline_.smem + operand;
#pragma unroll(kTransform ? 2 : 4)
    for (int i = converters_.thread; i < converters_.rows * kQuads; i += converters_.threads) {
      const int row = converters_.first_row + i / kQuads, quad = i % kQuads;
      const int token = step * C::kStepKV + row;
      const RawRow<typename C::Pool> raw{from + Ring::Offset(row, 0)};
      float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if constexpr (kTransform) {
        if (token < info.item.kv_count) {  // parameters cover no positions past the end
          VectorIndex<Lanes> at{
              0, info.kv_position + token, 0, info.item.head, PoolRow(p_, info.item, token), 0};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            at.dim = quad * 4 + e;
            x[e] = transform(typename Lanes::Vector{raw, kDim - 1, at.dim}, at);
          }
        }
      } else {
        raw.Quad(quad, x);  // the gather writes zeros past the end
      }
      *reinterpret_cast<Packed*>(to + Tile::Offset(row, quad / 2) + quad % 2 * 8) =
          Packed{{ptx::Pack2<T>(x[0], x[1]), ptx::Pack2<T>(x[2], x[3])}};
    }
  }

  const LaunchParams& p_;
  const VariantParams& variant_;
  const Pipeline<C>& pipeline_;
  Converters<C> converters_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_CONVERT_CUH_
