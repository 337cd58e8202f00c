// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Linear layers of a few rows: the weight is read from memory once, whatever the number of rows.
//
// BLAS packs the weight at each call before it multiplies, so that for 2 to 16 rows (batched
// decoding) its sgemm reads the weight at a fraction of the speed that memory has. GB/s of a
// float32 weight with N = 4096, K = 1024, one thread of a Zen 3 that reads 21 to 25 GB/s:
//
//   rows               1     2     4     8    16
//   this kernel       24    22    18    13     9  (from 8 on bound by arithmetic, 70 to 80 GFLOP/s)
//   OpenBLAS 0.3.34   24     7     8     5     3
//   oneDNN 3.2        24     9     8     6     2
//
// (The machine was shared: best runs of several.) At 1 and 2 rows 16-bit weights keep the same
// GB/s, that is, take half the time. BLAS draws level between 32 and 128 rows.
// `tvm-flashinfer bench linear` measures anew.
#ifndef TVM_FLASHINFER_RUNTIME_LINEAR_STREAM_H_
#define TVM_FLASHINFER_RUNTIME_LINEAR_STREAM_H_

#include <cstdint>

namespace tvm_flashinfer {
namespace linear {

/*! \brief How elements are stored; arithmetic is float32 throughout. */
enum class Storage : int { kFloat32, kFloat16, kBFloat16 };

/*! \brief Where the weight keeps output feature n and input feature k. */
enum class WeightLayout : int {
  kNK,  //!< weight[n * ld + k], as torch.nn.Linear
  kKN,  //!< weight[k * ld + n], as a right-hand operand of matmul
};

/*! \brief Rows of x are padded with zeros to a multiple of this, the widest vector of any target.
 */
inline constexpr int64_t kPadding = 16;

/*! \brief y[i, j] = sum_k x[i, k] * W[j, k] for i < m, j < n, with one fixed order of the sum. */
struct StreamArgs {
  const float* x;      //!< [m, x_stride], columns k .. round_up(k, kPadding) are zero
  int64_t x_stride;    //!< at least round_up(k, kPadding)
  const void* weight;  //!< first output feature of this call
  int64_t weight_ld;   //!< elements from one line of the weight to the next
  float* y;            //!< [m, y_stride]
  int64_t y_stride;
  int64_t m, n, k;
  Storage storage;  //!< of the weight
  WeightLayout layout;
};

/*! \brief What is compiled once per instruction set. */
struct Kernels {
  const char* name;
  /*! The order of the sum depends on neither m nor n: a row's result is the same, bit for bit,
   *  alone or among others, and however the output features are cut into calls. */
  void (*stream)(const StreamArgs& args);
  void (*widen)(const void* from, Storage storage, float* to, int64_t count);
  void (*narrow)(const float* from, void* to, Storage storage, int64_t count);
};

Kernels BaselineKernels();
#if defined(__x86_64__)
Kernels Avx2Kernels();
Kernels Avx512Kernels();
#endif

}  // namespace linear
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_LINEAR_STREAM_H_
