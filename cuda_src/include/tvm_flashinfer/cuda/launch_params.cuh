// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The operands of a run as kernels take them. Divisors that a launch fixes are multiplied by: what
// a block does once, at the end of an item, costs three cycles an instruction, and a division
// twenty instructions.
#ifndef TVM_FLASHINFER_CUDA_LAUNCH_PARAMS_CUH_
#define TVM_FLASHINFER_CUDA_LAUNCH_PARAMS_CUH_

#include <cstdint>

#include "../host_device.h"
#include "../params.h"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief Divides by a number that is known when a kernel is launched.
 *
 * x / d is (x + floor(x m / 2^32)) / 2^s for s = ceil(log2 d), m = floor(2^32 (2^s - d) / d) + 1
 * (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994,
 * figure 4.1); below 2^31 the sum does not overflow.
 */
class Divisor {
 public:
  /*! \param value At least 1. */
  explicit Divisor(int32_t value) : value_(static_cast<uint32_t>(value)) {
    while ((uint64_t{1} << shift_) < value_) ++shift_;
    const uint64_t excess = (uint64_t{1} << shift_) - value_;
    multiplier_ = static_cast<uint32_t>((excess << 32) / value_ + 1);
  }

  TVM_FLASHINFER_HOST_DEVICE int32_t value() const { return static_cast<int32_t>(value_); }
  /*! \param x In [0, 2^31). */
  TVM_FLASHINFER_HOST_DEVICE int32_t Divide(int32_t x) const {
    const auto dividend = static_cast<uint32_t>(x);
    const auto high = static_cast<uint32_t>(uint64_t{dividend} * multiplier_ >> 32);
    return static_cast<int32_t>((dividend + high) >> shift_);
  }
  TVM_FLASHINFER_HOST_DEVICE int32_t Rest(int32_t x) const { return x - Divide(x) * value(); }

 private:
  uint32_t value_, multiplier_;
  uint32_t shift_ = 0;
};

/*! \brief AttentionParams, checked (CheckParams), and what they are divided by. */
struct LaunchParams : AttentionParams {
  Divisor page;   //!< tokens of a page
  Divisor group;  //!< query heads of a KV head

  explicit LaunchParams(const AttentionParams& p)
      : AttentionParams(p), page(p.page_size), group(p.num_qo_heads / p.num_kv_heads) {}
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LAUNCH_PARAMS_CUH_
