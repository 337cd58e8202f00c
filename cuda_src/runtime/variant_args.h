// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// A variant's parameters on their way from the FFI to a kernel.
#ifndef TVM_FLASHINFER_RUNTIME_VARIANT_ARGS_H_
#define TVM_FLASHINFER_RUNTIME_VARIANT_ARGS_H_

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm_flashinfer/cpu/kernel.h>
#include <tvm_flashinfer/variant.h>

namespace tvm_flashinfer {

/*! \brief Checked parameters; tensors are kept alive as long as this. */
class BoundVariantArgs {
 public:
  /*!
   * \brief Replace the parameters.
   * \param values One per parameter the kernel declares: a number, or a contiguous tensor.
   * \param device Where tensors must lie.
   * \throws ValueError, TypeError naming the parameter; the old ones stay.
   */
  void Bind(const KernelTraits& kernel, const tvm::ffi::Array<tvm::ffi::Any>& values,
            DLDevice device);
  /*! \brief The same for parameters that the caller keeps alive; allocates nothing. */
  void Bind(const KernelTraits& kernel, tvm::ffi::PackedArgs values, DLDevice device);

  /*! \throws ValueError unless every parameter is bound. */
  const VariantArgs* Get(const KernelTraits& kernel) const;

  /*!
   * \param at What the run visits.
   * \param plan Names `at`: what was checked for one plan isn't checked again; -1 names none.
   * \throws ValueError unless every parameter is bound, and every tensor covers `at`.
   */
  const VariantArgs* Get(const KernelTraits& kernel, const VisitedRange& at, int64_t plan);

 private:
  VariantArgs args_{};
  int32_t count_ = -1;  //!< bound parameters; -1: never bound
  tvm::ffi::Array<tvm::ffi::Any> values_;
  int64_t checked_plan_ = -1;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_VARIANT_ARGS_H_
