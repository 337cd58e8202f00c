// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The part of ptx.cuh that only sm_90a has: products of a warpgroup, the registers of one,
// and copies of boxes by the tensor memory accelerator.
#ifndef TVM_FLASHINFER_CUDA_PTX_WARPGROUP_CUH_
#define TVM_FLASHINFER_CUDA_PTX_WARPGROUP_CUH_

#include <cuda.h>

#include "element.cuh"
#include "platform.cuh"

namespace tvm_flashinfer {
namespace cuda {
namespace ptx {

/*! \brief Order register accesses before the products that follow. */
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/*!
 * \brief Wait until at most `kPending` groups of products are in flight.
 * \tparam kPlace Waits of different places are not merged by the compiler.
 */
template <int kPending, int kPlace = 0>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;  // %1" ::"n"(kPending), "n"(kPlace) : "memory");
}
/*! \brief Keep the compiler from moving uses of `c` across this place. */
template <int kTiles>
__device__ __forceinline__ void PinRegisters(float (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(c[i][j])::"memory");
  }
}
/*! \brief Make copies that this thread has seen visible to products. */
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/*! \brief Wait for this thread's cp.async. */
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/*!
 * \brief True for one thread of a converged warp, always the same one. The compiler knows that it
 * is one: after a comparison of lanes, it makes a loop over lanes of every instruction that takes
 * operands of a warp (CopyBox).
 */
__device__ __forceinline__ bool ElectOne() {
  uint32_t elected;
  asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}"
               : "=r"(elected));
  return elected != 0;
}

/*! \brief Arrive, and let the phase last until `bytes` more have been copied (CopyBox). */
__device__ __forceinline__ void MbarrierArriveExpect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

using TensorMap = CUtensorMap;

/*! \brief Copy the box of a five-dimensional tensor at `at`, innermost first; by one thread. */
__device__ __forceinline__ void CopyBox(uint32_t shared, const TensorMap& map, const int (&at)[5],
                                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(barrier)
      : "memory");
}

/*! \brief Change this warpgroup's registers a thread: up waits until others have let go. */
template <int kCount>
__device__ __forceinline__ void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// c[64, n] (+)= a[64, 16] b[16, n], by a warpgroup; fragments as of MmaM16N8K16, 16 rows a warp.
// Descriptors are of wgmma_tile.cuh. Asynchronous: until WgmmaWait, neither `c` nor `a` nor the
// shared memory behind a descriptor may be touched. `WgmmaShared` takes a and b stored [m, k] and
// [n, k]; `WgmmaRegisters` takes a as fragments and b stored [k, n]; `WgmmaMixed` a as fragments
// and b stored [n, k]; `WgmmaSharedKN` a stored [m, k] and b stored [k, n].

//! Operands of sums, some tiles of `c` from one on.
#define TVM_FLASHINFER_TILE(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define TVM_FLASHINFER_TILES_4(i)                                                 \
  TVM_FLASHINFER_TILE(i), TVM_FLASHINFER_TILE(i + 1), TVM_FLASHINFER_TILE(i + 2), \
      TVM_FLASHINFER_TILE(i + 3)
#define TVM_FLASHINFER_TILES_8(i) TVM_FLASHINFER_TILES_4(i), TVM_FLASHINFER_TILES_4(i + 4)
//! The product that `wgmma` spells for an element type, with operands of T.
#define TVM_FLASHINFER_FOR_TYPE(wgmma)         \
  if constexpr (std::is_same_v<T, BFloat16>) { \
    wgmma("bf16");                             \
  } else {                                     \
    wgmma("f16");                              \
  }

template <typename T>
__device__ __forceinline__ void WgmmaShared(float (&c)[6][4], uint64_t a, uint64_t b,
                                            int accumulate) {
#define TVM_FLASHINFER_WGMMA(type)                                                              \
  asm volatile(                                                                                 \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %26, 0;\n\t"                                        \
      "wgmma.mma_async.sync.aligned.m64n48k16.f32." type "." type                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23}, %24, %25, p, 1, 1, 0, 0;\n\t}"                                 \
      : TVM_FLASHINFER_TILES_4(0), TVM_FLASHINFER_TILE(4), TVM_FLASHINFER_TILE(5)               \
      : "l"(a), "l"(b), "r"(accumulate))
  TVM_FLASHINFER_FOR_TYPE(TVM_FLASHINFER_WGMMA)
#undef TVM_FLASHINFER_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaMixed(float (&c)[6][4], const uint32_t (&a)[4], uint64_t b) {
#define TVM_FLASHINFER_WGMMA(type)                                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32." type "." type                     \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
               "%17, %18, %19, %20, %21, %22, %23}, {%24, %25, %26, %27}, %28, 1, 1, 1, 0;"    \
               : TVM_FLASHINFER_TILES_4(0), TVM_FLASHINFER_TILE(4), TVM_FLASHINFER_TILE(5)     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  TVM_FLASHINFER_FOR_TYPE(TVM_FLASHINFER_WGMMA)
#undef TVM_FLASHINFER_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaShared(float (&c)[8][4], uint64_t a, uint64_t b,
                                            int accumulate) {
#define TVM_FLASHINFER_WGMMA(type)                                                               \
  asm volatile(                                                                                  \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"                                         \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "  \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, " \
      "0;\n\t}"                                                                                  \
      : TVM_FLASHINFER_TILES_8(0)                                                                \
      : "l"(a), "l"(b), "r"(accumulate))
  TVM_FLASHINFER_FOR_TYPE(TVM_FLASHINFER_WGMMA)
#undef TVM_FLASHINFER_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaRegisters(float (&c)[8][4], const uint32_t (&a)[4],
                                               uint64_t b) {
#define TVM_FLASHINFER_WGMMA(type)                                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                     \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
               "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "  \
               "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                        \
               : TVM_FLASHINFER_TILES_8(0)                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  TVM_FLASHINFER_FOR_TYPE(TVM_FLASHINFER_WGMMA)
#undef TVM_FLASHINFER_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaShared(float (&c)[16][4], uint64_t a, uint64_t b,
                                            int accumulate) {
#define TVM_FLASHINFER_WGMMA(type)                                                                 \
  asm volatile(                                                                                    \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "    \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, " \
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
      "%55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n\t}"                \
      : TVM_FLASHINFER_TILES_8(0), TVM_FLASHINFER_TILES_8(8)                                       \
      : "l"(a), "l"(b), "r"(accumulate))
  TVM_FLASHINFER_FOR_TYPE(TVM_FLASHINFER_WGMMA)
#undef TVM_FLASHINFER_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaRegisters(float (&c)[16][4], const uint32_t (&a)[4],
                                               uint64_t b) {
#define TVM_FLASHINFER_WGMMA(type)                                                                 \
  asm volatile(                                                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "    \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, " \
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
      "%55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"       \
      : TVM_FLASHINFER_TILES_8(0), TVM_FLASHINFER_TILES_8(8)                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  TVM_FLASHINFER_FOR_TYPE(TVM_FLASHINFER_WGMMA)
#undef TVM_FLASHINFER_WGMMA
}

template <typename T>
__device__ __forceinline__ void WgmmaSharedKN(float (&c)[16][4], uint64_t a, uint64_t b) {
#define TVM_FLASHINFER_WGMMA(type)                                                                 \
  asm volatile(                                                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "    \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, " \
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
      "%55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, 1;"                     \
      : TVM_FLASHINFER_TILES_8(0), TVM_FLASHINFER_TILES_8(8)                                       \
      : "l"(a), "l"(b))
  TVM_FLASHINFER_FOR_TYPE(TVM_FLASHINFER_WGMMA)
#undef TVM_FLASHINFER_WGMMA
}

#undef TVM_FLASHINFER_FOR_TYPE
#undef TVM_FLASHINFER_TILES_8
#undef TVM_FLASHINFER_TILES_4
#undef TVM_FLASHINFER_TILE

}  // namespace ptx
}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_PTX_WARPGROUP_CUH_
