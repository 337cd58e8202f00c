// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// cuda/ptx.cuh for a host compiler. Asynchronous copies are performed when the barrier they
// arrive at completes its phase, and not before: what is read too early is NaN.
#ifndef TVM_FLASHINFER_EMULATOR_PTX_EMULATION_H_
#define TVM_FLASHINFER_EMULATOR_PTX_EMULATION_H_

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

namespace tvm_flashinfer {
namespace cuda {
namespace ptx {

using ::emulation::Block;

inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - Block::Current().shared());
}

inline void Load16(uint32_t (&r)[4], const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    Block::Current().Fail("misaligned global address of a 16-byte load");
  }
  std::memcpy(r, global, 16);
}
inline void LoadStream16(uint32_t (&r)[4], const void* global) { Load16(r, global); }

inline void Store16(void* global, const uint32_t (&r)[4]) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    Block::Current().Fail("misaligned global address of a 16-byte store");
  }
  std::memcpy(global, r, 16);
}

inline void CpAsync16(uint32_t shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    Block::Current().Fail("misaligned global address of cp.async");
  }
  uint8_t* to = Block::Current().Shared(shared, 16);
  std::memset(to, 0xff, 16);
  Block::Current().thread().copies.push_back({to, global});
}

inline void CpAsync16OrZero(uint32_t shared, const void* global, bool valid) {
  CpAsync16(shared, global);
  if (!valid) Block::Current().thread().copies.back().from = nullptr;
}

inline void StoreSharedZero16(uint32_t shared) {
  std::memset(Block::Current().Shared(shared, 16), 0, 16);
}

inline void MbarrierInit(uint32_t barrier, int count) {
  Block::Current().Mbarrier(barrier).Init(count);
}
inline void MbarrierArrive(uint32_t barrier) { Block::Current().Mbarrier(barrier).Arrive(); }
inline void MbarrierArriveAfterCopies(uint32_t barrier) {
  auto& block = Block::Current();
  auto& mbarrier = block.Mbarrier(barrier);
  for (const auto& copy : block.thread().copies) mbarrier.copies.push_back(copy);
  block.thread().copies.clear();
  mbarrier.Arrive();
}
inline void MbarrierWait(uint32_t barrier, int parity) {
  Block::Current().WaitMbarrier(barrier, parity);
}

namespace detail {

template <bool kTrans>
inline void LdMatrix(uint32_t (&r)[4], uint32_t shared) {
  struct Operand {
    uint32_t* r;
    const uint16_t* row;
  } self{r, reinterpret_cast<const uint16_t*>(Block::Current().Shared(shared, 16))};
  Block::Current().Warp(kTrans ? "ldmatrix.trans" : "ldmatrix", &self, [](void** all) {
    for (int lane = 0; lane < ::emulation::kLanes; ++lane) {
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
          const int major = lane / 4, minor = 2 * (lane % 4) + e;
          const auto* from = static_cast<Operand*>(all[m * 8 + (kTrans ? minor : major)]);
          pair[e] = from->row[kTrans ? major : minor];
        }
        static_cast<Operand*>(all[lane])->r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
}

}  // namespace detail

inline void LdMatrixX4(uint32_t (&r)[4], uint32_t shared) { detail::LdMatrix<false>(r, shared); }
inline void LdMatrixX4Trans(uint32_t (&r)[4], uint32_t shared) {
  detail::LdMatrix<true>(r, shared);
}

template <typename T>
inline void MmaM16N8K16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operand {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } self{c, a, {b0, b1}};
  Block::Current().Warp("mma", &self, [](void** all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < ::emulation::kLanes; ++lane) {
      const auto* o = static_cast<Operand*>(all[lane]);
      const int major = lane / 4, minor = 2 * (lane % 4);
      for (int e = 0; e < 2; ++e) {
        const auto half = [e](uint32_t v) { return static_cast<uint16_t>(v >> (16 * e)); };
        for (int i = 0; i < 4; ++i) {
          a[major + i % 2 * 8][minor + i / 2 * 8 + e] = ToFloat(T{half(o->a[i])});
        }
        for (int i = 0; i < 2; ++i) b[minor + i * 8 + e][major] = ToFloat(T{half(o->b[i])});
      }
    }
    for (int lane = 0; lane < ::emulation::kLanes; ++lane) {
      const auto* o = static_cast<Operand*>(all[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
        float sum = o->c[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        o->c[i] = sum;
      }
    }
  });
}

template <typename T>
inline uint32_t Pack2(float lo, float hi) {
  return ::tvm_flashinfer::FromFloat<T>(lo).bits |
         static_cast<uint32_t>(::tvm_flashinfer::FromFloat<T>(hi).bits) << 16;
}

template <typename T>
inline float ToFloat(T x) {
  return ::tvm_flashinfer::ToFloat(x);
}
template <typename T>
inline void ToFloat4(uint32_t packed, float (&x)[4]) {
  for (int i = 0; i < 4; ++i) {
    x[i] = ::tvm_flashinfer::ToFloat(T{static_cast<uint8_t>(packed >> (8 * i))});
  }
}
template <typename T>
inline void WidenToHalf4(uint32_t packed, uint32_t (&pairs)[2]) {
  float x[4];
  ToFloat4<T>(packed, x);
  for (int i = 0; i < 2; ++i) pairs[i] = Pack2<Float16>(x[2 * i], x[2 * i + 1]);
}
inline uint32_t SwapInnerBytes(uint32_t x) {
  return (x & 0xff0000ffu) | (x >> 8 & 0xff00u) | (x << 8 & 0xff0000u);
}
template <typename T>
inline T FromFloat(float x) {
  return ::tvm_flashinfer::FromFloat<T>(x);
}

inline float Exp2(float x) { return std::exp2(x); }
inline float Log2(float x) { return std::log2(x); }
inline float Divide(float a, float b) { return a / b; }
inline float Sin(float x) { return std::sin(x); }
inline float Cos(float x) { return std::cos(x); }

inline void WaitForEarlierLaunches() {}
inline void AllowNextLaunch() {}
inline void PrefetchL2(const void*) {}

inline void NamedBarrier(int id, int threads) { Block::Current().Barrier(id, threads); }

inline void NamedBarrierArrive(int id, int threads) { Block::Current().BarrierArrive(id, threads); }

inline int32_t AtomicAddOrdered(int32_t* address, int32_t value) {
  const int32_t old = *address;
  *address = old + value;
  return old;
}

inline void LoadL2(float (&v)[4], const float* address) { std::memcpy(v, address, sizeof(v)); }
inline float LoadL2(const float* address) { return *address; }

}  // namespace ptx
}  // namespace cuda
}  // namespace tvm_flashinfer

#if defined(TVM_FLASHINFER_SM90A)
#include "wgmma_emulation.h"
#endif

#endif  // TVM_FLASHINFER_EMULATOR_PTX_EMULATION_H_
