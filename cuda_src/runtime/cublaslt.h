// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The part of cuBLASLt that linear layers use, loaded at its first use: neither NVIDIA's headers
// nor its library is needed to build or load this one.
#ifndef TVM_FLASHINFER_RUNTIME_CUBLASLT_H_
#define TVM_FLASHINFER_RUNTIME_CUBLASLT_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace tvm_flashinfer {
namespace cublaslt {

// Values of NVIDIA's headers (cublas_api.h, cublasLt.h, library_types.h), part of its ABI.
enum ComputeType : int { kCompute32F = 68 };
enum DataType : int { kReal32F = 0, kReal16F = 2, kReal16BF = 14 };
enum Operation : int32_t { kNoTranspose = 0, kTranspose = 1 };
enum Epilogue : uint32_t { kEpilogueNone = 1, kEpilogueBias = 4 };
enum DescAttribute : int { kDescTransA = 3, kDescTransB = 4, kDescEpilogue = 7, kDescBias = 8 };
enum PreferenceAttribute : int { kMaxWorkspace = 1, kMinAlignmentA = 5 };  // then B, C and D

struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

using Handle = void*;

class Library {
 public:
  /*!
   * \brief Load the library, once.
   *
   * Looked for in this order: the path in the environment variable TVM_FLASHINFER_CUBLASLT; one
   * that the process has loaded already; the path given to SetPath (the Python package gives that
   * of NVIDIA's wheels); then libcublasLt.so.13 and libcublasLt.so.12 by name.
   * \throws RuntimeError if there is none, saying what was tried and what to do.
   */
  static const Library& Get();
  static void SetPath(const std::string& path);

  int (*create)(Handle* handle);
  int (*desc_create)(void** desc, int compute, int scale);
  int (*desc_set)(void* desc, int attribute, const void* value, size_t bytes);
  int (*layout_create)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t ld);
  int (*preference_create)(void** preference);
  int (*preference_set)(void* preference, int attribute, const void* value, size_t bytes);
  int (*preference_destroy)(void* preference);
  int (*heuristic)(Handle handle, void* desc, void* a, void* b, void* c, void* d, void* preference,
                   int requested, HeuristicResult* results, int* found);
  int (*matmul)(Handle handle, void* desc, const void* alpha, const void* a, void* a_layout,
                const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                void* d, void* d_layout, const Algorithm* algorithm, void* workspace,
                size_t workspace_bytes, void* stream);

 private:
  Library();
};

}  // namespace cublaslt
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_CUBLASLT_H_
