// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// A kernel table (kernel.h) of the templates: an element type, head dims, a variant and the query
// tiles asked for. nvcc compiles it for a GPU, a host compiler against the emulator.
#ifndef TVM_FLASHINFER_CUDA_KERNEL_TABLE_CUH_
#define TVM_FLASHINFER_CUDA_KERNEL_TABLE_CUH_

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "append.cuh"
#include "kernel.h"
#include "launch.cuh"

namespace tvm_flashinfer {
namespace cuda {

template <typename T>
struct ElementTypeOf;
template <>
struct ElementTypeOf<Float16> {
  static constexpr ElementType kValue = ElementType::kFloat16;
};
template <>
struct ElementTypeOf<BFloat16> {
  static constexpr ElementType kValue = ElementType::kBFloat16;
};

/*!
 * \tparam kRows Query tiles in packed rows, ascending; decode takes the first, prefill the last.
 */
template <typename T, int kHeadDimQK, int kHeadDimVO, typename Variant, int... kRows>
class __attribute__((visibility("hidden"))) KernelTable {
 public:
  static_assert(sizeof...(kRows) >= 1 && sizeof...(kRows) <= 4, "one to four query tiles");

  /*! \param causal The variant hides keys after the query. */
  static const CudaKernel* Get(bool causal) {
    static const CudaKernel table = Make(causal);
    return &table;
  }

 private:
  static CudaKernel Make(bool causal) {
    constexpr int32_t tiles[] = {kRows...};
    constexpr int32_t num_tiles = sizeof...(kRows);
    CudaKernel table{};
    table.abi = kCudaKernelAbi;
    table.q_type = ElementTypeOf<T>::kValue;
    table.kv_type = ElementTypeOf<T>::kValue;
    table.head_dim_qk = kHeadDimQK;
    table.head_dim_vo = kHeadDimVO;
    table.causal = causal ? 1 : 0;
    table.softmax = 1;
    table.row_tiles[0] = tiles[0];
    table.row_tiles[1] = tiles[num_tiles - 1];
    table.kv_align = 16;
    table.out_of_bounds_param = [](const VariantArgs*, const VisitedRange*) { return int32_t{-1}; };
    table.device_type = kDeviceType;
    table.num_tiles = num_tiles;
    for (int32_t i = 0; i < num_tiles; ++i) table.tiles[i] = tiles[i];
    table.num_workers = &NumWorkers;
    table.run = &Run;
    table.append = &Append;
    table.copy = &Copy;
    table.host_alloc = &HostAlloc;
    table.host_free = &HostFree;
    table.event_create = &EventCreate;
    table.event_record = &EventRecord;
    table.event_wait = &EventWait;
    table.event_destroy = &EventDestroy;
    return table;
  }

  static char* Message() {
    static thread_local char message[256];
    return message;
  }

  template <typename F>
  static const char* WithInstance(int32_t tile_rows, F f) {
    const char* error = nullptr;
    const bool found = WithTile<T, kHeadDimQK, kHeadDimVO, Variant, kRows...>(
        tile_rows, [&](auto instance) { error = f(instance); });
    if (found) return error;
    std::snprintf(Message(), 256, "no kernel was compiled for tile_rows = %d", tile_rows);
    return Message();
  }

  static const char* Check(const AttentionParams& p, int32_t tile_rows) {
    if (const char* error = CheckParams(p)) return error;
    const int group = p.num_qo_heads / p.num_kv_heads;
    if (group <= tile_rows) return nullptr;
    std::snprintf(Message(), 256, "tile_rows = %d cannot hold the %d query heads of a KV head",
                  tile_rows, group);
    return Message();
  }

  static int AppendBlocks(const CudaAppendParams& p, int32_t num_tokens) {
    const int heads = (p.rotated_q != nullptr ? p.num_qo_heads : 0) + 2 * p.num_kv_heads;
    return num_tokens * CeilDiv(heads, kAppendThreads / kWarpSize);
  }

#if defined(TVM_FLASHINFER_CUDA_EMULATION)
  static constexpr int32_t kDeviceType = 1;  // kDLCPU

  static const char* NumWorkers(int32_t, int32_t* blocks) {
    *blocks = 3;
    return nullptr;
  }
  template <typename F>
  static const char* Emulate(F f) {
    try {
      f();
      return nullptr;
    } catch (const std::exception& e) {
      std::snprintf(Message(), 256, "%s", e.what());
      return Message();
    }
  }
  static const char* Run(const AttentionParams* p, int32_t tile_rows, int32_t num_workers, void*) {
    if (const char* error = Check(*p, tile_rows)) return error;
    return WithInstance(tile_rows, [&](auto instance) {
      return Emulate([&] { decltype(instance)::Emulate(*p, num_workers, false); });
    });
  }
  static const char* Append(const CudaAppendParams* p, int32_t num_tokens, void*) {
    if (num_tokens == 0) return nullptr;
    return Emulate([&] {
      emulation::Launch(AppendBlocks(*p, num_tokens), kAppendThreads, 16, false,
                        [&] { AppendKernel<T, kHeadDimQK, kHeadDimVO>(*p, num_tokens); });
    });
  }
  static const char* Copy(void* to, const void* from, int64_t bytes, void*) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return nullptr;
  }
  static const char* HostAlloc(void** memory, int64_t bytes) {
    *memory = std::malloc(static_cast<size_t>(bytes));
    return *memory == nullptr ? "out of memory" : nullptr;
  }
  static void HostFree(void* memory) { std::free(memory); }
  static const char* EventCreate(void** event) {
    *event = nullptr;
    return nullptr;
  }
  static const char* EventRecord(void*, void*) { return nullptr; }
  static const char* EventWait(void*) { return nullptr; }
  static void EventDestroy(void*) {}
#else
  static constexpr int32_t kDeviceType = 2;  // kDLCUDA

  static const char* Describe(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  static const char* NumWorkers(int32_t tile_rows, int32_t* blocks) {
    return WithInstance(tile_rows, [&](auto instance) {
      int device = 0, multiprocessors = 0, resident = 0;
      cudaGetDevice(&device);
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      const cudaError_t error = decltype(instance)::BlocksPerMultiprocessor(&resident);
      *blocks = resident * multiprocessors;
      return Describe(error);
    });
  }
  static const char* Run(const AttentionParams* p, int32_t tile_rows, int32_t num_workers,
                         void* stream) {
    if (const char* error = Check(*p, tile_rows)) return error;
    return WithInstance(tile_rows, [&](auto instance) {
      return Describe(
          decltype(instance)::Launch(*p, num_workers, static_cast<cudaStream_t>(stream)));
    });
  }
  static const char* Append(const CudaAppendParams* p, int32_t num_tokens, void* stream) {
    if (num_tokens == 0) return nullptr;
    return Describe(LaunchOverlapping(AppendKernel<T, kHeadDimQK, kHeadDimVO>,
                                      AppendBlocks(*p, num_tokens), kAppendThreads, 0,
                                      static_cast<cudaStream_t>(stream), *p, num_tokens));
  }
  static const char* Copy(void* to, const void* from, int64_t bytes, void* stream) {
    return Describe(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault,
                                    static_cast<cudaStream_t>(stream)));
  }
  static const char* HostAlloc(void** memory, int64_t bytes) {
    return Describe(cudaHostAlloc(memory, static_cast<size_t>(bytes), cudaHostAllocDefault));
  }
  static void HostFree(void* memory) { cudaFreeHost(memory); }
  static const char* EventCreate(void** event) {
    return Describe(
        cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), cudaEventDisableTiming));
  }
  static const char* EventRecord(void* event, void* stream) {
    return Describe(
        cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
  }
  static const char* EventWait(void* event) {
    return Describe(cudaEventSynchronize(static_cast<cudaEvent_t>(event)));
  }
  static void EventDestroy(void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }
#endif
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KERNEL_TABLE_CUH_
