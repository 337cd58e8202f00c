// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Where the tokens of a work item lie in the KV pool.
#ifndef TVM_FLASHINFER_CUDA_PAGE_LOOKUP_CUH_
#define TVM_FLASHINFER_CUDA_PAGE_LOOKUP_CUH_

#include "../params.h"
#include "platform.cuh"
#include "ptx.cuh"

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

class PageLookup {
 public:
  __device__ __forceinline__ explicit PageLookup(int32_t page_size)
      : size_(static_cast<uint32_t>(page_size)),
        shift_((size_ & (size_ - 1)) == 0 ? ptx::HighestBit(size_) : -1) {}

  /*! \param token Counted within the item; negative, or from its end on: no such token. */
  __device__ __forceinline__ TokenPlace Find(const int32_t* pages, const WorkItem& item,
                                             int token) const {
    TokenPlace place;
    if (token >= 0 && token < item.kv_count) {
      const auto at = static_cast<uint32_t>(item.kv_begin + token);
      const uint32_t page = shift_ >= 0 ? at >> shift_ : at / size_;
      place.entry = static_cast<int32_t>(at - page * size_);
      place.page = pages[page];
    }
    return place;
  }

 private:
  uint32_t size_;
  int shift_;  //!< log2 of the size, or -1
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_PAGE_LOOKUP_CUH_
