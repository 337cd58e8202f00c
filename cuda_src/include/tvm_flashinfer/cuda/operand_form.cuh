// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// How keys and values get from the pool to the matrix products, and what that asks of a tile.
#ifndef TVM_FLASHINFER_CUDA_OPERAND_FORM_CUH_
#define TVM_FLASHINFER_CUDA_OPERAND_FORM_CUH_

#include <type_traits>

#include "element.cuh"
#include "swizzle.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief The form of an instance's operands.
 * \tparam Pool_ Elements of the pool.
 * \tparam kConvertK_, kConvertV_ Rows are converted to operands by the consumers: the pool is of
 * another type, or the variant transforms them. Else they are copied to where products read them.
 * \tparam kSharedKV_ A value is the start of its key (latent attention): rows are loaded once.
 * \tparam kSoftmax_, kRowOutputs_ Of the variant; the second: it transforms outputs.
 * \tparam kWidened_ Converting is no more than widening an 8-bit float.
 * \tparam kKeyPartner_, kKeyPaired_ VariantDefaults' of keys that are transformed and no more.
 */
template <typename Pool_, bool kConvertK_ = false, bool kConvertV_ = false, bool kSharedKV_ = false,
          bool kSoftmax_ = true, bool kRowOutputs_ = false, bool kWidened_ = false,
          int kKeyPartner_ = -1, int kKeyPaired_ = 0>
struct OperandForm {
  using Pool = Pool_;
  static constexpr bool kConvertK = kConvertK_;
  static constexpr bool kConvertV = kConvertV_;
  static constexpr bool kSharedKV = kSharedKV_;
  static constexpr bool kSoftmax = kSoftmax_;
  static constexpr bool kRowOutputs = kRowOutputs_;
  static constexpr bool kWidened = kWidened_;
  static constexpr int kKeyPartner = kKeyPartner_;
  static constexpr int kKeyPaired = kKeyPaired_;
  //! Rows go from the pool to the products untouched, and weights are a softmax.
  static constexpr bool kPlain = !kConvertK && !kConvertV && kSoftmax;
};

template <typename T>
inline constexpr bool kIsFloat8 = std::is_same_v<T, Float8E4M3> || std::is_same_v<T, Float8E5M2>;

/*! \brief The form that a variant needs over a pool of TKV, with operands of T. */
template <typename T, typename TKV, typename Variant, bool kSharedKV>
using FormOf =
    OperandForm<TKV, !std::is_same_v<T, TKV> || Variant::kHasKey,
                !std::is_same_v<T, TKV> || Variant::kHasValue, kSharedKV, Variant::kSoftmax,
                Variant::kHasOutput, kIsFloat8<TKV> && !Variant::kHasKey && !Variant::kHasValue,
                std::is_same_v<T, TKV> && Variant::kHasKey ? Variant::kKeyPartner : -1,
                Variant::kKeyPaired>;

/*! \brief A tile of rows as they lie in the pool, on their way to be converted. */
template <typename Pool, int kCols, int kRows>
struct RawTile {
  static constexpr int kPitch = kCols / kElementsPerUnit<Pool> * static_cast<int>(sizeof(Pool));
  static_assert(kPitch % 16 == 0, "rows of a pool are multiples of 16 bytes");
  static constexpr int kChunks = kPitch / 16;
  static constexpr int kBytes = (kRows * kPitch + 1023) / 1024 * 1024;

  /*! \brief Byte offset of a 16-byte chunk. */
  __device__ __forceinline__ static uint32_t Offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kPitch + chunk * 16);
  }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_OPERAND_FORM_CUH_
