// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Where the tokens of a work item lie in the KV pool.
#ifndef TVM_FLASHINFER_CUDA_PAGE_LOOKUP_CUH_
#define TVM_FLASHINFER_CUDA_PAGE_LOOKUP_CUH_

#include "launch_params.cuh"
#include "platform.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief A token's page and its place there; page -1: no such token. As looked up: no arithmetic
 * may touch a page id before it is needed, or the lookup would be waited for.
 */
struct TokenPlace {
  int32_t page = -1;
  int32_t entry = 0;

  /*! \return Elements from the head's first token in the pool, or -1. */
  __device__ __forceinline__ int64_t Offset(const KVStrides& strides) const {
    return page < 0 ? -1 : page * strides.page + entry * strides.token;
  }
};

/*!
 * \param pages Of the item's row.
 * \param token Counted within the item; negative, or from its end on: no such token.
 */
__device__ __forceinline__ TokenPlace FindToken(const LaunchParams& p, const int32_t* pages,
                                                const WorkItem& item, int token) {
  TokenPlace place;
  if (token >= 0 && token < item.kv_count) {
    const int at = item.kv_begin + token;
    const int page = p.page.Divide(at);
    place.entry = at - page * p.page_size;
    place.page = pages[page];
  }
  return place;
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_PAGE_LOOKUP_CUH_
