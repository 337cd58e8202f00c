// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// linear_stream_kernel.h for AVX2, FMA and F16C; CMakeLists.txt sets the compiler flags of this
// file.
#if defined(__x86_64__)
#include "linear_stream_kernel.h"

namespace tvm_flashinfer {
namespace linear {

Kernels Avx2Kernels() { return {"avx2", StreamAny, WidenAny, NarrowAny}; }

}  // namespace linear
}  // namespace tvm_flashinfer
#endif
