// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// A variant's parameters on their way from the FFI to a kernel.
#ifndef TVM_FLASHINFER_RUNTIME_VARIANT_ARGS_H_
#define TVM_FLASHINFER_RUNTIME_VARIANT_ARGS_H_

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>
#include <tvm_flashinfer/cpu/kernel.h>
#include <tvm_flashinfer/variant.h>

namespace tvm_flashinfer {

/*! \brief Checked parameters; tensors are kept alive as long as this. */
class BoundVariantArgs {
 public:
  /*!
   * \brief Replace the parameters.
   * \param values One per parameter the kernel declares: a number, or a contiguous CPU tensor.
   * \throws ValueError, TypeError naming the parameter; the old ones stay.
   */
  void Bind(const KernelTraits& kernel, const tvm::ffi::Array<tvm::ffi::Any>& values);

  /*!
   * \param at Where the elements of the run lie.
   * \throws ValueError unless every parameter is bound, and every tensor covers `at`.
   */
  const VariantArgs* Get(const KernelTraits& kernel, const ElementIndex<Interval>& at) const;

 private:
  VariantArgs args_{};
  tvm::ffi::Array<tvm::ffi::Any> values_;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_VARIANT_ARGS_H_
