// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "kernel_handle.h"

#include <utility>

#include "check.h"

namespace tvm_flashinfer {

KernelHandle::KernelHandle(tvm::ffi::Function factory) : factory_(std::move(factory)) {
  traits_ = static_cast<const KernelTraits*>(factory_().cast<void*>());
  TVM_FLASHINFER_CHECK(traits_->abi == kCpuKernelAbi || traits_->abi == kCudaKernelAbi, ValueError)
      << "kernel was compiled for kernel interface " << traits_->abi
      << ", this libtvm_flashinfer has interfaces " << kCpuKernelAbi << " (CPU) and "
      << kCudaKernelAbi << " (CUDA): compile the model again, or install the tvm-flashinfer that "
      << "compiled it";
}

const CpuKernel& KernelHandle::cpu() const {
  TVM_FLASHINFER_CHECK(!is_cuda(), ValueError)
      << "argument `kernel` is a CUDA kernel, this call runs on the CPU";
  return *static_cast<const CpuKernel*>(traits_);
}

}  // namespace tvm_flashinfer
