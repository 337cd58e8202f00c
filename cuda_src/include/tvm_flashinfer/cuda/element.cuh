// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Element types of tensor-core operands. They are only storage and a name: arithmetic is float32,
// conversions are PTX (ptx.cuh).
#ifndef TVM_FLASHINFER_CUDA_ELEMENT_CUH_
#define TVM_FLASHINFER_CUDA_ELEMENT_CUH_

#include <type_traits>

#include "../dtype.h"
#include "../kernel_traits.h"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Elements moved by one 16-byte access, the unit of every global and shared copy. */
constexpr int kElementsPerChunk = 8;

template <typename T>
constexpr ElementType ElementTypeOf() {
  if constexpr (std::is_same_v<T, float>) return ElementType::kFloat32;
  if constexpr (std::is_same_v<T, Float16>) return ElementType::kFloat16;
  if constexpr (std::is_same_v<T, BFloat16>) return ElementType::kBFloat16;
  if constexpr (std::is_same_v<T, Float8E4M3>) return ElementType::kFloat8E4M3;
  if constexpr (std::is_same_v<T, Float8E5M2>) return ElementType::kFloat8E5M2;
  if constexpr (std::is_same_v<T, Int8>) return ElementType::kInt8;
  if constexpr (std::is_same_v<T, Int4>) return ElementType::kInt4;
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_ELEMENT_CUH_
