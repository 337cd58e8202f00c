// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// linear_stream_kernel.h for AVX-512 (F, BW, DQ, VL); CMakeLists.txt sets the compiler flags of
// this file.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "linear_stream_kernel.h"

namespace tvm_flashinfer {
namespace linear {

Kernels Avx512Kernels() { return {"avx512", StreamAny, WidenAny, NarrowAny}; }

}  // namespace linear
}  // namespace tvm_flashinfer
#endif
