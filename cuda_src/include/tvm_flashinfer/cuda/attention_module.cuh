// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The exported functions of one attention module: an element type, head dims and a variant, for the
// row tiles asked for. A generated source defines what it is and includes this file; nvcc compiles
// it for a GPU, a host compiler against the emulator.
//
//   #define TVM_FLASHINFER_ELEMENT BFloat16                  // or Float16
//   #define TVM_FLASHINFER_POOL BFloat16                     // any type of dtype.h
//   #define TVM_FLASHINFER_HEAD_DIM_QK 128
//   #define TVM_FLASHINFER_HEAD_DIM_VO 128
//   #define TVM_FLASHINFER_VARIANT StandardVariant<true>
//   #define TVM_FLASHINFER_ROW_TILES 16, 64, 128
//   #include <tvm_flashinfer/cuda/attention_module.cuh>
#include <cstdio>
#include <exception>

#include "../variant.h"
#include "launch.cuh"

namespace tvm_flashinfer {
namespace cuda {
namespace {

using Element = TVM_FLASHINFER_ELEMENT;
using Variant = TVM_FLASHINFER_VARIANT;
using Kernels = Instances<Element, TVM_FLASHINFER_POOL, TVM_FLASHINFER_HEAD_DIM_QK,
                          TVM_FLASHINFER_HEAD_DIM_VO, Variant, TVM_FLASHINFER_ROW_TILES>;

thread_local char message[256];

template <typename F>
const char* WithInstance(int tile_rows, bool shared, F f) {
  const char* error = nullptr;
  const bool found = Kernels::With(tile_rows, shared, [&](auto instance) { error = f(instance); });
  if (found) return error;
  std::snprintf(message, sizeof(message), "no kernel was compiled for tile_rows = %d", tile_rows);
  return message;
}

#if !defined(TVM_FLASHINFER_CUDA_EMULATION)
const char* Describe(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

const char* Check(const AttentionParams& p, int tile_rows) {
  if (const char* error = CheckParams<TVM_FLASHINFER_POOL>(p)) return error;
  if (p.num_qo_heads / p.num_kv_heads > tile_rows) {
    std::snprintf(message, sizeof(message),
                  "tile_rows = %d cannot hold the %d query heads of a KV head", tile_rows,
                  p.num_qo_heads / p.num_kv_heads);
    return message;
  }
  return nullptr;
}

}  // namespace
}  // namespace cuda
}  // namespace tvm_flashinfer

#if defined(TVM_FLASHINFER_CUDA_EMULATION)
/*! \brief Run on the emulator, over host memory. \return null, or what went wrong. */
extern "C" __attribute__((visibility("default"))) const char* tvm_flashinfer_attention_emulate(
    const tvm_flashinfer::AttentionParams* params, int tile_rows, int num_workers, int reversed) {
  using namespace tvm_flashinfer::cuda;
  if (const char* error = Check(*params, tile_rows)) return error;
  return WithInstance(tile_rows, Kernels::SharesKV(*params), [&](auto instance) -> const char* {
    try {
      decltype(instance)::Emulate(*params, num_workers, reversed != 0);
      return nullptr;
    } catch (const std::exception& e) {
      std::snprintf(message, sizeof(message), "%s", e.what());
      return message;
    }
  });
}
#else
/*! \brief Launch on a stream. \return null, or what went wrong. */
extern "C" __attribute__((visibility("default"))) const char* tvm_flashinfer_attention_run(
    const tvm_flashinfer::AttentionParams* params, int tile_rows, int num_workers, void* stream) {
  using namespace tvm_flashinfer::cuda;
  if (const char* error = Check(*params, tile_rows)) return error;
  return WithInstance(tile_rows, Kernels::SharesKV(*params), [&](auto instance) {
    return Describe(
        decltype(instance)::Launch(*params, num_workers, static_cast<cudaStream_t>(stream)));
  });
}

/*! \brief Blocks of a tile's kernel resident on one multiprocessor. */
extern "C" __attribute__((visibility("default"))) const char* tvm_flashinfer_attention_occupancy(
    int tile_rows, int* blocks) {
  using namespace tvm_flashinfer::cuda;
  return WithInstance(tile_rows, false, [&](auto instance) {
    return Describe(decltype(instance)::BlocksPerMultiprocessor(blocks));
  });
}
#endif
