// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What a packed row of a query tile stands for.
#ifndef TVM_FLASHINFER_CUDA_QUERY_ROW_CUH_
#define TVM_FLASHINFER_CUDA_QUERY_ROW_CUH_

#include <cstdint>

#include "platform.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Worked out once, by the producer that copies the row, and left in shared memory. */
struct alignas(16) QueryRow {
  int32_t token;     //!< index into q, or -1: past the tile
  int32_t head;      //!< query head
  int32_t request;   //!< of the variant's ElementIndex; past the tile as of its last row
  int32_t position;  //!< likewise
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_QUERY_ROW_CUH_
