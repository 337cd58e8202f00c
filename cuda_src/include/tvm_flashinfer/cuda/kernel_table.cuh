// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// A kernel table (kernel.h) of the templates: element types, head dims, a variant and the query
// tiles asked for. nvcc compiles it for a GPU, a host compiler against the emulator.
#ifndef TVM_FLASHINFER_CUDA_KERNEL_TABLE_CUH_
#define TVM_FLASHINFER_CUDA_KERNEL_TABLE_CUH_

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../interval.h"
#include "append.cuh"
#include "kernel.h"
#include "launch.cuh"
#include "merge_states.cuh"
#include "token_order.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \tparam T Queries, new keys and values, outputs: Float16 or BFloat16.
 * \tparam TKV The pool: those, float, Float8E4M3, Float8E5M2, Int8 or Int4.
 * \tparam kRows Query tiles in packed rows, ascending; decode takes the first, prefill the last.
 */
template <typename T, typename TKV, int kHeadDimQK, int kHeadDimVO, typename Variant, int... kRows>
class __attribute__((visibility("hidden"))) KernelTable {
 public:
  static_assert(sizeof...(kRows) >= 1 && sizeof...(kRows) <= 4, "one to four query tiles");
  using Params = typename Variant::Params;

  /*!
   * \param causal The variant hides keys after the query.
   * \param params, num_params What the variant declares; they outlive the table.
   */
  static const CudaKernel* Get(bool causal, const VariantParam* params = nullptr,
                               int32_t num_params = 0) {
    static const CudaKernel table = Make(causal, params, num_params);
    return &table;
  }

 private:
  static CudaKernel Make(bool causal, const VariantParam* params, int32_t num_params) {
    constexpr int32_t tiles[] = {kRows...};
    constexpr int32_t num_tiles = sizeof...(kRows);
    CudaKernel table{};
    table.abi = kCudaKernelAbi;
    table.q_type = ElementTypeOf<T>();
    table.kv_type = ElementTypeOf<TKV>();
    table.head_dim_qk = kHeadDimQK;
    table.head_dim_vo = kHeadDimVO;
    table.num_params = num_params;
    table.params = params;
    table.causal = causal ? 1 : 0;
    table.softmax = Variant::kSoftmax ? 1 : 0;
    table.stores = Variant::kHasStoreKey || Variant::kHasStoreValue ? 1 : 0;
    table.row_tiles[0] = tiles[0];
    table.row_tiles[1] = tiles[num_tiles - 1];
    table.kv_align = 16;
    table.out_of_bounds_param = &OutOfBoundsParam;
    table.device_type = kDeviceType;
    table.num_tiles = num_tiles;
    for (int32_t i = 0; i < num_tiles; ++i) table.tiles[i] = tiles[i];
    const int32_t costs[] = {TileCost<kRows>()...};
    for (int32_t i = 0; i < num_tiles; ++i) table.tile_costs[i] = costs[i];
    table.num_workers = &NumWorkers;
    table.run = &Run;
    table.append = &Append;
    table.merge = &Merge;
    table.move = &Move;
    table.copy = &Copy;
    table.host_alloc = &HostAlloc;
    table.host_free = &HostFree;
    table.event_create = &EventCreate;
    table.event_record = &EventRecord;
    table.event_wait = &EventWait;
    table.event_destroy = &EventDestroy;
    table.is_capturing = &IsCapturing;
    return table;
  }

  /*! On an H100 a token takes 14 ns of warpgroups for 128 rows, of single warps 25 ns for 64. */
  template <int kTileRows>
  static constexpr int32_t TileCost() {
#if defined(TVM_FLASHINFER_SM90A)
    if (std::is_same_v<T, TKV> && FitsWarpgroups<Variant>(kHeadDimQK, kHeadDimVO, kTileRows)) {
      return 40;
    }
#endif
    return kTileRows < 64 ? 64 : kTileRows;
  }

  static char* Message() {
    static thread_local char message[256];
    return message;
  }

  static int32_t OutOfBoundsParam(const VariantArgs* args, const VisitedRange* at) {
    if constexpr (std::is_same_v<Params, VariantArgs>) {
      return FindOutOfBoundsParam<Variant, kHeadDimQK, kHeadDimVO>(*args, *at);
    }
    return -1;
  }

  using Kernels = Instances<T, TKV, kHeadDimQK, kHeadDimVO, Variant, kRows...>;

  template <typename F>
  static const char* WithInstance(int32_t tile_rows, bool shared, F f) {
    const char* error = nullptr;
    const bool found =
        Kernels::With(tile_rows, shared, [&](auto instance) { error = f(instance); });
    if (found) return error;
    std::snprintf(Message(), 256, "no kernel was compiled for tile_rows = %d", tile_rows);
    return Message();
  }

  static const char* Check(const AttentionParams& p, int32_t tile_rows) {
    if (const char* error = CheckParams<TKV>(p)) return error;
    const int group = p.num_qo_heads / p.num_kv_heads;
    if (group <= tile_rows) return nullptr;
    std::snprintf(Message(), 256, "tile_rows = %d cannot hold the %d query heads of a KV head",
                  tile_rows, group);
    return Message();
  }

  static int AppendBlocks(const CudaAppendParams& p, int32_t num_tokens) {
    return num_tokens * CeilDiv(NumNewHeads(p), kAppendWarps);
  }
  static constexpr int kAppendShared =
      kAppendWarps * (kHeadDimQK > kHeadDimVO ? kHeadDimQK : kHeadDimVO) * sizeof(float);
  static const Params& VariantOf(const void* params) {
    static const Params none{};  // of a variant without parameters
    return params == nullptr ? none : *static_cast<const Params*>(params);
  }

  static const char* Append(const CudaAppendParams* p, int32_t num_tokens, void* stream) {
    return LaunchSmall(AppendKernel<T, TKV, kHeadDimQK, kHeadDimVO, Variant>,
                       AppendBlocks(*p, num_tokens), kAppendThreads, kAppendShared, stream, *p,
                       VariantOf(p->variant_params), num_tokens);
  }
  static const char* Merge(const CudaMergeParams* p, void* stream) {
    return MergeStates<T>(*p, stream);
  }
  static const char* Move(const CudaMoveParams* p, void* stream) { return MoveTokens(*p, stream); }

#if defined(TVM_FLASHINFER_CUDA_EMULATION)
  static const char* NumWorkers(int32_t, int32_t* blocks) {
    *blocks = 3;
    return nullptr;
  }
  static const char* Run(const AttentionParams* p, int32_t tile_rows, int32_t num_workers, void*) {
    if (const char* error = Check(*p, tile_rows)) return error;
    return WithInstance(tile_rows, Kernels::SharesKV(*p), [&](auto instance) {
      return Emulate([&] { decltype(instance)::Emulate(*p, num_workers, false); });
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
  static const char* IsCapturing(void*, int32_t* capturing) {
    *capturing = 0;
    return nullptr;
  }
#else
  static const char* NumWorkers(int32_t tile_rows, int32_t* blocks) {
    return WithInstance(tile_rows, false, [&](auto instance) {
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
    return WithInstance(tile_rows, Kernels::SharesKV(*p), [&](auto instance) {
      return Describe(
          decltype(instance)::Launch(*p, num_workers, static_cast<cudaStream_t>(stream)));
    });
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
  static const char* IsCapturing(void* stream, int32_t* capturing) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
    *capturing = status == cudaStreamCaptureStatusNone ? 0 : 1;
    return Describe(error);
  }
#endif
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KERNEL_TABLE_CUH_
