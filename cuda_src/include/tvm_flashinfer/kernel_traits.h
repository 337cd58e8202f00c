// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What every compiled attention kernel says of itself, whatever it runs on.
#ifndef TVM_FLASHINFER_KERNEL_TRAITS_H_
#define TVM_FLASHINFER_KERNEL_TRAITS_H_

#include <cstdint>
#include <type_traits>

#include "dtype.h"
#include "interval.h"
#include "params.h"
#include "variant.h"

namespace tvm_flashinfer {

/*! \brief Element types a kernel may be compiled for; values are part of the ABI. */
enum class ElementType : int32_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kFloat8E4M3 = 3,  //!< from here on of pools only
  kFloat8E5M2 = 4,
  kInt8 = 5,
  kInt4 = 6
};

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

/*! \brief The start of every kernel table. `abi` says which table it is. */
struct KernelTraits {
  int32_t abi;
  ElementType q_type;   //!< of queries, new keys and values, and outputs
  ElementType kv_type;  //!< of the KV pool
  int32_t head_dim_qk;
  int32_t head_dim_vo;
  int32_t num_params;          //!< parameters of the variant, passed to a run as VariantArgs
  const VariantParam* params;  //!< [num_params]
  int32_t causal;              //!< the variant hides keys after the query: the scheduler skips them
  int32_t softmax;             //!< without it there is no LSE
  int32_t stores;              //!< new keys or values are transformed on their way into the pool
  int32_t row_tiles[2];        //!< packed rows of the decode and of the prefill tile
  int32_t kv_align;
  /*! \brief Index of a parameter that elements in `at` may read past its end, or -1. */
  int32_t (*out_of_bounds_param)(const VariantArgs* args, const VisitedRange* at);
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_KERNEL_TRAITS_H_
