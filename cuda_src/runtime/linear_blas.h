// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The packaged BLAS behind linear layers of many rows: found and loaded at its first use.
#ifndef TVM_FLASHINFER_RUNTIME_LINEAR_BLAS_H_
#define TVM_FLASHINFER_RUNTIME_LINEAR_BLAS_H_

#include <cstdint>
#include <string>

namespace tvm_flashinfer {
namespace linear {

/*!
 * \brief A loaded BLAS that runs each call on the thread that makes it.
 *
 * Threads come from TVM's pool, so the library's own threads are switched off for the process.
 */
class Blas {
 public:
  /*!
   * \brief Load the library, once.
   *
   * Looked for in this order: the path in the environment variable TVM_FLASHINFER_BLAS; the path
   * given to SetPath (the Python package gives that of scipy-openblas32); then, by name,
   * libscipy_openblas.so, libopenblas.so.0, libopenblas.so.
   * \throws RuntimeError if there is none, saying what was tried and what to do.
   */
  static const Blas& Get();

  /*! \brief Where to look first. Without effect once the library is loaded. */
  static void SetPath(const std::string& path);

  /*! \brief c[i, j] (+)= sum_k a[i, k] * op(b)[k, j], row-major; b is [n, k] if `transpose_b`. */
  void Sgemm(bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
             const float* b, int64_t ldb, bool accumulate, float* c, int64_t ldc) const;

  const std::string& path() const { return path_; }

 private:
  Blas();

  using SgemmFn = void (*)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                           const float* a, int lda, const float* b, int ldb, float beta, float* c,
                           int ldc);
  SgemmFn sgemm_ = nullptr;
  std::string path_;
};

}  // namespace linear
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_LINEAR_BLAS_H_
