// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What a stage of the ring holds.
#ifndef TVM_FLASHINFER_CUDA_STAGE_RECORD_CUH_
#define TVM_FLASHINFER_CUDA_STAGE_RECORD_CUH_

#include <cstdint>

#include "../variant.h"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Left in shared memory by the producers, for consumers with no time to work it out. */
struct StageRecord {
  int32_t step;
  TileClass tile;
  int32_t followers;  //!< stages of the item after it; 2: or more
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_STAGE_RECORD_CUH_
