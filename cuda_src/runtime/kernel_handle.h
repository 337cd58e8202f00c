// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#ifndef TVM_FLASHINFER_RUNTIME_KERNEL_HANDLE_H_
#define TVM_FLASHINFER_RUNTIME_KERNEL_HANDLE_H_

#include <tvm/ffi/function.h>
#include <tvm_flashinfer/cpu/kernel.h>
#include <tvm_flashinfer/cuda/kernel.h>
#include <tvm_flashinfer/kernel_traits.h>

namespace tvm_flashinfer {

/*!
 * \brief A kernel table and the library that holds it.
 *
 * A kernel library exports one function that returns the address of its table (see
 * tvm_flashinfer/jit.py); keeping the function keeps the library loaded.
 */
class KernelHandle {
 public:
  /*! \throws ValueError when `factory` was compiled for another version of this runtime. */
  explicit KernelHandle(tvm::ffi::Function factory);
  const KernelTraits* operator->() const { return traits_; }
  const KernelTraits& operator*() const { return *traits_; }

  bool is_cuda() const { return traits_->abi == kCudaKernelAbi; }
  /*! \throws ValueError for a CUDA kernel. */
  const CpuKernel& cpu() const;
  /*! \brief Only where is_cuda(). */
  const CudaKernel& cuda() const { return *static_cast<const CudaKernel*>(traits_); }
  /*! \brief DLPack's device type of the memory that the kernel works on. */
  DLDeviceType device_type() const {
    return is_cuda() ? static_cast<DLDeviceType>(cuda().device_type) : kDLCPU;
  }

 private:
  tvm::ffi::Function factory_;
  const KernelTraits* traits_;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_KERNEL_HANDLE_H_
