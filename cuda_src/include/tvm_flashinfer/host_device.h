// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#ifndef TVM_FLASHINFER_HOST_DEVICE_H_
#define TVM_FLASHINFER_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define TVM_FLASHINFER_HOST_DEVICE __host__ __device__
#else
#define TVM_FLASHINFER_HOST_DEVICE
#endif

#endif  // TVM_FLASHINFER_HOST_DEVICE_H_
