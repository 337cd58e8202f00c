// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// linear_stream_kernel.h for any CPU of the architecture.
#include "linear_stream_kernel.h"

namespace tvm_flashinfer {
namespace linear {

Kernels BaselineKernels() { return {"baseline", StreamAny, WidenAny, NarrowAny}; }

}  // namespace linear
}  // namespace tvm_flashinfer
