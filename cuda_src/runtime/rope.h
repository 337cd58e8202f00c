// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Rotary position embedding of new queries and keys, before they are appended and attended.
#ifndef TVM_FLASHINFER_RUNTIME_ROPE_H_
#define TVM_FLASHINFER_RUNTIME_ROPE_H_

#include <tvm_flashinfer/cpu/kernel.h>

#include <cstdint>
#include <vector>

#include "token_heads.h"

namespace tvm_flashinfer {

/*!
 * \brief How a model rotates its heads.
 *
 * Every scaling (linear, llama3, yarn, longrope) is a change of these numbers, made where the cache
 * is created: see tvm_flashinfer/rope.py.
 */
struct RopeConfig {
  std::vector<float> frequencies;  //!< [rotary_dim / 2]: radians per position of a pair of elements
  float magnitude = 1.0f;          //!< multiplies what is rotated
  bool interleaved = false;        //!< pairs are (2i, 2i + 1); else (i, i + rotary_dim / 2)

  int32_t rotary_dim() const { return 2 * static_cast<int32_t>(frequencies.size()); }
};

/*! \brief Rotates the tokens of a step; sines and cosines are computed once for all its layers. */
class Rope {
 public:
  Rope(RopeConfig config, int32_t max_tokens);

  /*! \brief Start a step whose token i is at positions[i]. */
  void Prepare(const int32_t* positions, int32_t count);

  /*!
   * \brief to = rotated from, of every token of the step. Elements from rotary_dim on are copied.
   * \param type Of both operands; arithmetic is float32.
   */
  void Rotate(ElementType type, TokenHeads from, TokenHeads to, int32_t heads, int32_t dim) const;

 private:
  RopeConfig config_;
  int32_t count_ = 0;
  std::vector<float> cos_, sin_;  //!< [token, rotary_dim / 2]
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_ROPE_H_
