// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Checks of the operands of BatchAttention: strided queries, outputs and pools, and index vectors.
// A check that passes allocates nothing; one that fails names the argument.
#ifndef TVM_FLASHINFER_RUNTIME_BATCH_ATTENTION_CHECK_H_
#define TVM_FLASHINFER_RUNTIME_BATCH_ATTENTION_CHECK_H_

#include <tvm/ffi/container/tensor.h>
#include <tvm_flashinfer/cpu/kernel.h>
#include <tvm_flashinfer/params.h>

#include <cstdint>
#include <ostream>

namespace tvm_flashinfer {

using tvm::ffi::TensorView;

/*! \brief An argument's name as the caller knows it; a level's are written `levels[2].kv_indptr`.
 */
struct ArgName {
  const char* name;
  int32_t level = -1;
};
std::ostream& operator<<(std::ostream& out, const ArgName& arg);

/*! \brief An int32 vector on the CPU. */
struct IndexVector {
  const int32_t* data = nullptr;
  int64_t size = 0;
  int32_t operator[](int64_t i) const { return data[i]; }
};

/*! \brief Check a contiguous int32 vector on the CPU; `size` -1 accepts any length. */
IndexVector CheckIndexVector(ArgName arg, const TensorView& t, int64_t size = -1);

/*! \brief Check that an indptr starts at 0 and never decreases. */
void CheckIndptr(ArgName arg, const IndexVector& indptr);

/*! \brief (token, head, element) view of an operand; elements are contiguous. */
struct TokenView {
  char* data;
  int64_t token_stride, head_stride;  //!< in elements
};

/*!
 * \brief Check an operand of shape [..., heads, dim] whose leading axes hold `tokens` in all and
 * lie evenly in memory, so that they collapse into one axis.
 * \param written Whether the run writes it: then its elements must not overlap.
 */
TokenView CheckTokens(ArgName arg, const TensorView& t, DLDataType dtype, int64_t tokens,
                      int64_t heads, int64_t dim, bool written, DLDevice device = {kDLCPU, 0});

/*! \brief Check a contiguous float32 [..., heads] tensor of `tokens` tokens. */
float* CheckLse(ArgName arg, const TensorView& t, int64_t tokens, int64_t heads,
                DLDevice device = {kDLCPU, 0});

/*! \brief Axes of a KV pool's page: NHD is (token, head, element), HND (head, token, element). */
enum class PoolOrder : int32_t { kNHD, kHND };

/*! \brief Which of keys and values a tensor holds: one of them, or both with an axis of 2. */
enum class PoolPart : int32_t { kAlone, kKeysOfBoth, kValuesOfBoth };

/*! \brief A KV pool of pages. */
struct PoolView {
  char* data;
  KVStrides strides;
  int64_t num_pages, page_size;
};

/*!
 * \brief Check a KV pool.
 *
 * NHD: [pages, page_size, heads, dim], HND: [pages, heads, page_size, dim]; with an axis of 2 after
 * the first where keys and values share the tensor; without the page axis, a token is a page.
 * Elements of 8 bits may come as uint8; those of 4 bits do, two in each, the even one low.
 */
PoolView CheckPool(ArgName arg, const TensorView& t, ElementType type, PoolOrder order,
                   PoolPart part, int64_t heads, int64_t head_dim, DLDevice device = {kDLCPU, 0});

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_BATCH_ATTENTION_CHECK_H_
