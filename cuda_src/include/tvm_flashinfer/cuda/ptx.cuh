// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Every PTX instruction the kernels use, and nothing else (ptx_warpgroup.cuh is its part for
// sm_90a). Shared memory is addressed by 32-bit shared-window addresses. The emulator provides the
// same functions for a host compiler, so a kernel that keeps to this header runs on a CPU too.
#ifndef TVM_FLASHINFER_CUDA_PTX_CUH_
#define TVM_FLASHINFER_CUDA_PTX_CUH_

#include <cstdint>
#include <type_traits>

#include "element.cuh"
#include "platform.cuh"

#if defined(TVM_FLASHINFER_CUDA_EMULATION)
#include "ptx_emulation.h"
#else

namespace tvm_flashinfer {
namespace cuda {
namespace ptx {

/*! \brief Shared-window address of a pointer into shared memory. */
__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Loads ----

/*! \brief 16 bytes that are read once, by this launch and no other thread: kept out of L1. */
__device__ __forceinline__ void LoadStream16(uint32_t (&r)[4], const void* global) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(global));
}

/*! \brief 16 bytes. */
__device__ __forceinline__ void Load16(uint32_t (&r)[4], const void* global) {
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(global)
               : "memory");
}

/*! \brief Store 16 bytes. */
__device__ __forceinline__ void Store16(void* global, const uint32_t (&r)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- Asynchronous copies, sm_80 ----

/*! \brief Copy 16 bytes global -> shared, past L1. */
__device__ __forceinline__ void CpAsync16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global)
               : "memory");
}

/*! \brief As CpAsync16, or 16 bytes of zeros if not `valid`; nothing is read then. */
__device__ __forceinline__ void CpAsync16OrZero(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

/*! \brief Write 16 bytes of zeros to shared memory. */
__device__ __forceinline__ void StoreSharedZero16(uint32_t shared) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(shared), "r"(0) : "memory");
}

// ---- Barriers in shared memory, sm_80 ----

/*! \brief Initialise an mbarrier whose phases complete at `count` arrivals. */
__device__ __forceinline__ void MbarrierInit(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void MbarrierArrive(uint32_t barrier) {
  asm volatile(
      "{\n\t.reg .b64 state;\n\tmbarrier.arrive.shared.b64 state, [%0];\n\t}" ::"r"(barrier)
      : "memory");
}

/*! \brief Arrive once all cp.async of this thread so far are complete. */
__device__ __forceinline__ void MbarrierArriveAfterCopies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/*! \brief Wait for the completion of the phase of this parity. */
__device__ __forceinline__ void MbarrierWait(uint32_t barrier, int parity) {
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#endif
  } while (done == 0);
}

// ---- Matrix fragments, sm_80 ----

/*!
 * \brief Load four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 give the rows of matrix i.
 * Lane l receives elements (l / 4, 2 (l % 4) + {0, 1}) of each.
 */
__device__ __forceinline__ void LdMatrixX4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

/*! \brief As LdMatrixX4, of the transposed matrices. */
__device__ __forceinline__ void LdMatrixX4Trans(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

/*! \brief c[16, 8] += a[16, 16] b[16, 8], accumulated in float32. */
template <typename T>
__device__ __forceinline__ void MmaM16N8K16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, Float16>, "tensor-core operands are Float16 or BFloat16");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/*! \brief A 16-bit element as float32. */
__device__ __forceinline__ float ToFloat(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float ToFloat(Float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

/*! \brief Elements of other types, as float32. */
__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(Int8 x) { return static_cast<float>(x.value); }
__device__ __forceinline__ float ToFloat(Float8E5M2 x) {
  return ptx::ToFloat(Float16{static_cast<uint16_t>(x.bits << 8)});  // the upper half of a Float16
}
__device__ __forceinline__ float ToFloat(Float8E4M3 x) {
#if __CUDA_ARCH__ >= 890
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(x.bits)));
  return ptx::ToFloat(Float16{static_cast<uint16_t>(pair)});
#else
  return ::tvm_flashinfer::ToFloat(x);
#endif
}

/*! \brief Bytes 0, 2, 1, 3 of a word. */
__device__ __forceinline__ uint32_t SwapInnerBytes(uint32_t x) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, 0x3120;" : "=r"(y) : "r"(x));
  return y;
}

/*! \brief Round to a 16-bit element, to nearest even. */
template <typename T>
__device__ __forceinline__ T FromFloat(float x) {
  T narrow;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  }
  return narrow;
}

/*! \brief Round two floats to nearest even and pack them, `lo` in the lower half. */
template <typename T>
__device__ __forceinline__ uint32_t Pack2(float lo, float hi) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  }
  return packed;
}

/*! \brief Four 8-bit floats that follow each other, the first lowest, as two pairs of Float16. */
template <typename T>
__device__ __forceinline__ void WidenToHalf4(uint32_t packed, uint32_t (&pairs)[2]) {
#if __CUDA_ARCH__ >= 890
  if constexpr (std::is_same_v<T, Float8E4M3>) {
    asm("{\n\t.reg .b16 lo, hi;\n\tmov.b32 {lo, hi}, %2;\n\tcvt.rn.f16x2.e4m3x2 %0, lo;\n\t"
        "cvt.rn.f16x2.e4m3x2 %1, hi;\n\t}"
        : "=r"(pairs[0]), "=r"(pairs[1])
        : "r"(packed));
  } else {
    asm("{\n\t.reg .b16 lo, hi;\n\tmov.b32 {lo, hi}, %2;\n\tcvt.rn.f16x2.e5m2x2 %0, lo;\n\t"
        "cvt.rn.f16x2.e5m2x2 %1, hi;\n\t}"
        : "=r"(pairs[0]), "=r"(pairs[1])
        : "r"(packed));
  }
#else
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pairs[i] = Pack2<Float16>(ptx::ToFloat(T{static_cast<uint8_t>(packed >> (16 * i))}),
                              ptx::ToFloat(T{static_cast<uint8_t>(packed >> (16 * i + 8))}));
  }
#endif
}

/*! \brief The same as float32. */
template <typename T>
__device__ __forceinline__ void ToFloat4(uint32_t packed, float (&x)[4]) {
#if __CUDA_ARCH__ >= 890
  uint32_t pair[2];
  WidenToHalf4<T>(packed, pair);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = ptx::ToFloat(Float16{static_cast<uint16_t>(pair[i / 2] >> (i % 2 * 16))});
  }
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = ptx::ToFloat(T{static_cast<uint8_t>(packed >> (8 * i))});
#endif
}

// ---- Arithmetic ----

/*! \brief 2^x within 2 ulp; 2^-inf is 0. */
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/*! \brief log2(x) within 2^-22, or 2^-22 of it where that is more. */
__device__ __forceinline__ float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/*! \brief a / b within 2 ulp, for b of at most 2^126. */
__device__ __forceinline__ float Divide(float a, float b) {
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

/*! \brief Sine and cosine of an angle in [-pi, pi], within 2^-20.9. */
__device__ __forceinline__ float Sin(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Cos(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Between launches, sm_90 ----

/*! \brief Wait for the launches before this one; at once where they do not overlap. */
__device__ __forceinline__ void WaitForEarlierLaunches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/*! \brief Let the next launch start as blocks of this one leave. */
__device__ __forceinline__ void AllowNextLaunch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Cache ----

/*! \brief Have a line brought to the L2 cache: a hint, which changes nothing that can be read. */
__device__ __forceinline__ void PrefetchL2(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// ---- Between threads ----

/*! \brief Barrier of `threads` threads (a multiple of 32) of the block, named by `id` in [1, 15].
 */
__device__ __forceinline__ void NamedBarrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/*! \brief Arrive at such a barrier without waiting for it. */
__device__ __forceinline__ void NamedBarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/*!
 * \brief Add. Device-wide, whoever sees the sum sees what this thread saw and did before; read what
 * others did with LoadL2.
 */
__device__ __forceinline__ int32_t AtomicAddOrdered(int32_t* address, int32_t value) {
  int32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(address), "r"(value)
               : "memory");
  return old;
}

/*! \brief Load 4 floats past L1, as what other blocks wrote in this launch must be. */
__device__ __forceinline__ void LoadL2(float (&v)[4], const float* address) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(address));
}

/*! \brief Load a float past L1. */
__device__ __forceinline__ float LoadL2(const float* address) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address));
  return v;
}

}  // namespace ptx
}  // namespace cuda
}  // namespace tvm_flashinfer

#if defined(TVM_FLASHINFER_SM90A)
#include "ptx_warpgroup.cuh"
#endif

#endif  // TVM_FLASHINFER_CUDA_EMULATION

#endif  // TVM_FLASHINFER_CUDA_PTX_CUH_
