// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// cuda/ptx_warpgroup.cuh for a host compiler. Products are performed when they are waited for, and
// not before: accumulators that are read too early are stale, and a tile that is released too early
// is the next one's, or NaN.
#ifndef TVM_FLASHINFER_EMULATOR_WGMMA_EMULATION_H_
#define TVM_FLASHINFER_EMULATOR_WGMMA_EMULATION_H_

#include <type_traits>

#include "emulator.h"

namespace tvm_flashinfer {
namespace cuda {
namespace ptx {

namespace detail {

constexpr int kFloat16Operands = 0, kBFloat16Operands = 1;

inline float Widen(uint16_t bits, int type) {
  return type == kBFloat16Operands ? ::tvm_flashinfer::ToFloat(BFloat16{bits})
                                   : ::tvm_flashinfer::ToFloat(Float16{bits});
}

/*! \brief Element of an operand behind a descriptor: of a 128-byte swizzle, or of none. */
inline float Operand(uint64_t descriptor, bool transpose, int outer, int k, int type) {
  const auto field = [&](int shift) {
    return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4;
  };
  auto& block = Block::Current();
  const bool swizzled = descriptor >> 62 == 1;
  if (!swizzled && (descriptor >> 62 != 0 || transpose))
    block.Fail("a descriptor of no known form");
  uint32_t at = field(0);
  if (!swizzled) {
    at += outer / 8 * field(32) + k / 8 * field(16) + outer % 8 * 16 + k % 8 * 2;
  } else if (transpose) {
    at += outer / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + outer % 64 * 2;
  } else {
    at += outer / 8 * field(32) + outer % 8 * 128 + k * 2;
  }
  if (swizzled) at ^= (at >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, block.Shared(at, 2), 2);
  return Widen(bits, type);
}

/*! \brief The product whose parts are the `index`-th of each thread's first group. */
inline void Perform(::emulation::Thread* threads, size_t index) {
  const auto part = [&](int t) -> const ::emulation::PendingProduct& {
    return threads[t].product_groups.front()[index];
  };
  const auto& any = part(0);
  std::vector<float> b(16 * any.columns);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < any.columns; ++n) {
      b[k * any.columns + n] = Operand(any.b_at, any.transpose, n, k, any.type);
    }
  }
  float a[64][16];
  for (int t = 0; t < ::emulation::kWarpgroup; ++t) {
    const auto& own = part(t);
    if (own.a_at != any.a_at || own.b_at != any.b_at) {
      Block::Current().Fail("threads of a warpgroup give different descriptors");
    }
    const int warp = t / 32, lane = t % 32;
    for (int i = 0; any.a_at == 0 && i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        const auto bits = static_cast<uint16_t>(own.a[i] >> (16 * e));
        a[warp * 16 + lane / 4 + i % 2 * 8][2 * (lane % 4) + i / 2 * 8 + e] = Widen(bits, any.type);
      }
    }
  }
  for (int m = 0; any.a_at != 0 && m < 64; ++m) {
    for (int k = 0; k < 16; ++k) a[m][k] = Operand(any.a_at, false, m, k, any.type);
  }
  for (int t = 0; t < ::emulation::kWarpgroup; ++t) {
    const auto& own = part(t);
    const int warp = t / 32, lane = t % 32;
    for (int i = 0; i < any.columns / 2; ++i) {
      const int row = warp * 16 + lane / 4 + i % 4 / 2 * 8;
      const int column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float sum = own.accumulate ? own.c[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k * any.columns + column];
      own.c[i] = sum;
    }
  }
}

template <typename T>
inline void Issue(::emulation::PendingProduct product) {
  product.type = std::is_same_v<T, BFloat16> ? kBFloat16Operands : kFloat16Operands;
  Block::Current().thread().products.push_back(product);
}

}  // namespace detail

inline void WaitForCopies() {
  auto& copies = Block::Current().thread().copies;
  for (const auto& copy : copies) copy.Perform();
  copies.clear();
}

inline bool ElectOne() { return threadIdx.x % 32 == 0; }

inline void MbarrierArriveExpect(uint32_t barrier, int bytes) {
  auto& mbarrier = Block::Current().Mbarrier(barrier);
  mbarrier.bytes += bytes;
  mbarrier.Arrive();
}

/*! \brief A tensor of 16-bit elements under the 128-byte swizzle, and its box. */
struct TensorMap {
  static constexpr int kDims = 5;
  const uint8_t* base;
  uint64_t size[kDims], stride[kDims];  // bytes
  uint32_t box[kDims];

  bool Encode(const void* from, const uint64_t (&sizes)[kDims],
              const uint64_t (&strides)[kDims - 1], const uint32_t (&box_sizes)[kDims]) {
    base = static_cast<const uint8_t*>(from);
    for (int d = 0; d < kDims; ++d) {
      size[d] = sizes[d];
      stride[d] = d == 0 ? 2 : strides[d - 1];
      box[d] = box_sizes[d];
    }
    return true;
  }
};

/*! \brief Whole rows of 128 bytes, which is what a box's innermost axis must be here. */
inline void CopyBox(uint32_t shared, const TensorMap& map, const int (&at)[5], uint32_t barrier) {
  auto& block = Block::Current();
  auto& mbarrier = block.Mbarrier(barrier);
  if (map.box[0] * 2 != 128 || shared % 1024 != 0) block.Fail("a box that is not swizzled whole");
  int64_t rows = 1;
  for (int d = 1; d < TensorMap::kDims; ++d) rows *= map.box[d];
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* from = map.base + at[0] * 2;
    bool inside = true;
    int64_t rest = row;
    for (int d = 1; d < TensorMap::kDims; ++d) {
      const uint64_t index = static_cast<uint64_t>(at[d] + rest % map.box[d]);
      rest /= map.box[d];
      inside = inside && index < map.size[d];
      if (inside) from += index * map.stride[d];
    }
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      const uint32_t to = static_cast<uint32_t>(shared + row * 128 + chunk * 16);
      uint8_t* place = block.Shared(to ^ (to >> 7 & 7) << 4, 16);
      std::memset(place, 0xff, 16);
      mbarrier.copies.push_back({place, inside ? from + chunk * 16 : nullptr});
    }
  }
  mbarrier.CountBytes(rows * 128);
}

inline void WgmmaFence() {}
inline void WgmmaCommit() {
  auto& thread = Block::Current().thread();
  thread.product_groups.push_back(std::move(thread.products));
  thread.products.clear();
}
template <int kPending, int = 0>
inline void WgmmaWait() {
  Block::Current().Warpgroup("wgmma.wait_group", [](::emulation::Thread* threads) {
    while (threads[0].product_groups.size() > kPending) {
      for (size_t i = 0; i < threads[0].product_groups.front().size(); ++i) {
        detail::Perform(threads, i);
      }
      for (int t = 0; t < ::emulation::kWarpgroup; ++t) threads[t].product_groups.pop_front();
    }
  });
}
template <int kTiles>
inline void PinRegisters(float (&)[kTiles][4]) {}
inline void FenceAsyncProxy() {}

template <int kCount>
inline void RaiseRegisters() {}
template <int kCount>
inline void LowerRegisters() {}

template <typename T, int kTiles>
inline void WgmmaShared(float (&c)[kTiles][4], uint64_t a, uint64_t b, int accumulate) {
  detail::Issue<T>({c[0], kTiles * 8, {}, a, b, false, accumulate != 0, 0});
}
template <typename T, int kTiles>
inline void WgmmaRegisters(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  detail::Issue<T>({c[0], kTiles * 8, {a[0], a[1], a[2], a[3]}, 0, b, true, true, 0});
}
template <typename T, int kTiles>
inline void WgmmaMixed(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  detail::Issue<T>({c[0], kTiles * 8, {a[0], a[1], a[2], a[3]}, 0, b, false, true, 0});
}
template <typename T, int kTiles>
inline void WgmmaSharedKN(float (&c)[kTiles][4], uint64_t a, uint64_t b) {
  detail::Issue<T>({c[0], kTiles * 8, {}, a, b, true, true, 0});
}

}  // namespace ptx
}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_EMULATOR_WGMMA_EMULATION_H_
