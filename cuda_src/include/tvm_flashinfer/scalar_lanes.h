// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The vocabulary of variants (variant.h) over one element: in a CUDA thread, and on a CPU for what
// all lanes of a vector share.
#ifndef TVM_FLASHINFER_SCALAR_LANES_H_
#define TVM_FLASHINFER_SCALAR_LANES_H_

#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "host_device.h"
#include "variant.h"

namespace tvm_flashinfer {

struct ScalarLanes {
  using Float = float;
  using Int = int32_t;
  using UInt = uint32_t;
  using Mask = bool;
  using Uniform = ScalarLanes;
  /*! A head vector as float32, and the element that is computed. */
  struct Vector {
    const float* data;
    int32_t last;  //!< its last element
    int32_t dim;
  };

#define TVM_FLASHINFER_LANES_FN TVM_FLASHINFER_HOST_DEVICE static inline
  TVM_FLASHINFER_LANES_FN Float F(float x) { return x; }
  TVM_FLASHINFER_LANES_FN Int I(int32_t x) { return x; }
  TVM_FLASHINFER_LANES_FN Mask B(bool x) { return x; }
  template <typename T>
  TVM_FLASHINFER_LANES_FN T Splat(T x) {
    return x;
  }
  TVM_FLASHINFER_LANES_FN Float ToFloat(Int x) { return static_cast<float>(x); }
  TVM_FLASHINFER_LANES_FN Int ToInt(Float x) { return static_cast<int32_t>(x); }
  TVM_FLASHINFER_LANES_FN Int ToInt(UInt x) { return static_cast<int32_t>(x); }
  TVM_FLASHINFER_LANES_FN UInt ToUInt(Int x) { return static_cast<uint32_t>(x); }
  TVM_FLASHINFER_LANES_FN Mask Not(Mask m) { return !m; }
  template <typename T>
  TVM_FLASHINFER_LANES_FN T Select(Mask m, T a, T b) {
    return m ? a : b;
  }
  template <typename T>
  TVM_FLASHINFER_LANES_FN T Min(T a, T b) {
    return a < b ? a : b;
  }
  template <typename T>
  TVM_FLASHINFER_LANES_FN T Max(T a, T b) {
    return a > b ? a : b;
  }
  TVM_FLASHINFER_LANES_FN Int FloorDiv(Int a, Int b) {
    const Int q = a / b;
    return q - (a - q * b != 0 && (a < 0) != (b < 0) ? 1 : 0);
  }
  TVM_FLASHINFER_LANES_FN Int FloorMod(Int a, Int b) { return a - FloorDiv(a, b) * b; }
  TVM_FLASHINFER_LANES_FN Int ShiftRight(Int a, Int bits) { return a >> bits; }
  TVM_FLASHINFER_LANES_FN Int ShiftLeft(Int a, Int bits) {
    return static_cast<Int>(static_cast<UInt>(a) << bits);
  }
  TVM_FLASHINFER_LANES_FN Int BitAnd(Int a, Int b) { return a & b; }
  TVM_FLASHINFER_LANES_FN Int BitOr(Int a, Int b) { return a | b; }
  TVM_FLASHINFER_LANES_FN Int BitXor(Int a, Int b) { return a ^ b; }

  TVM_FLASHINFER_LANES_FN Float Element(const Vector& x) { return x.data[x.dim]; }
  /*! An index past an end reads that end. */
  TVM_FLASHINFER_LANES_FN Float Element(const Vector& x, Int index) {
    return x.data[Max(Int{0}, Min(index, x.last))];
  }

  template <typename T>
  TVM_FLASHINFER_LANES_FN T LoadAs(const VariantArg& arg, Int index) {
    return static_cast<const T*>(arg.data)[index];
  }
  TVM_FLASHINFER_LANES_FN Float LoadFloat(const VariantArg& arg, Int index) {
    return LoadAs<float>(arg, index);
  }
  TVM_FLASHINFER_LANES_FN Float LoadFloat16(const VariantArg& arg, Int index) {
    return tvm_flashinfer::ToFloat(LoadAs<Float16>(arg, index));
  }
  TVM_FLASHINFER_LANES_FN Float LoadBFloat16(const VariantArg& arg, Int index) {
    return tvm_flashinfer::ToFloat(LoadAs<BFloat16>(arg, index));
  }
  TVM_FLASHINFER_LANES_FN Int LoadInt(const VariantArg& arg, Int index) {
    return LoadAs<int32_t>(arg, index);
  }
  TVM_FLASHINFER_LANES_FN Int LoadInt8(const VariantArg& arg, Int index) {
    return LoadAs<int8_t>(arg, index);
  }
  TVM_FLASHINFER_LANES_FN Int LoadUInt8(const VariantArg& arg, Int index) {
    return LoadAs<uint8_t>(arg, index);
  }
  TVM_FLASHINFER_LANES_FN Mask LoadBool(const VariantArg& arg, Int index) {
    return LoadAs<uint8_t>(arg, index) != 0;
  }

  TVM_FLASHINFER_LANES_FN Float Exp(Float x) { return expf(x); }
  TVM_FLASHINFER_LANES_FN Float Exp2(Float x) { return exp2f(x); }
  TVM_FLASHINFER_LANES_FN Float Log(Float x) { return logf(x); }
  TVM_FLASHINFER_LANES_FN Float Tanh(Float x) { return tanhf(x); }
  TVM_FLASHINFER_LANES_FN Float Sigmoid(Float x) { return 1.0f / (1.0f + expf(-x)); }
  TVM_FLASHINFER_LANES_FN Float Sqrt(Float x) { return sqrtf(x); }
  TVM_FLASHINFER_LANES_FN Float Abs(Float x) { return fabsf(x); }
  TVM_FLASHINFER_LANES_FN Float Sin(Float x) { return sinf(x); }
  TVM_FLASHINFER_LANES_FN Float Cos(Float x) { return cosf(x); }
  /*! Of angles in [-pi, pi]. */
  TVM_FLASHINFER_LANES_FN Float SinWithinTurn(Float x) { return sinf(x); }
  TVM_FLASHINFER_LANES_FN Float CosWithinTurn(Float x) { return cosf(x); }
#undef TVM_FLASHINFER_LANES_FN
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_SCALAR_LANES_H_
