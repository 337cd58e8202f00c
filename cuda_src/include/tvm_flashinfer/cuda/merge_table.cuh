// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// A kernel table (kernel.h) that merges attention states and does nothing else.
#ifndef TVM_FLASHINFER_CUDA_MERGE_TABLE_CUH_
#define TVM_FLASHINFER_CUDA_MERGE_TABLE_CUH_

#include "merge_states.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \tparam T Outputs: float, Float16 or BFloat16. */
template <typename T>
const CudaKernel* MergeTable() {
  static const CudaKernel table = [] {
    CudaKernel made{};
    made.abi = kCudaKernelAbi;
    made.q_type = made.kv_type = ElementTypeOf<T>();
    made.device_type = kDeviceType;
    made.merge = [](const CudaMergeParams* p, void* stream) { return MergeStates<T>(*p, stream); };
    return made;
  }();
  return &table;
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_MERGE_TABLE_CUH_
