// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Checks of tensors at the FFI boundary: a wrong one is named, with what was given and expected.
#ifndef TVM_FLASHINFER_RUNTIME_TENSOR_VIEW_H_
#define TVM_FLASHINFER_RUNTIME_TENSOR_VIEW_H_

#include <tvm/ffi/dtype.h>

#include <tvm/runtime/tensor.h>
#include <tvm_flashinfer/cpu/kernel.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "check.h"

namespace tvm_flashinfer {

inline DLDataType ToDLDataType(ElementType type) {
  switch (type) {
    case ElementType::kFloat16:
      return {kDLFloat, 16, 1};
    case ElementType::kBFloat16:
      return {kDLBfloat, 16, 1};
    case ElementType::kFloat8E4M3:
      return {kDLFloat8_e4m3fn, 8, 1};
    case ElementType::kFloat8E5M2:
      return {kDLFloat8_e5m2, 8, 1};
    case ElementType::kInt8:
      return {kDLInt, 8, 1};
    case ElementType::kInt4:  // two elements a byte
      return {kDLUInt, 8, 1};
    default:
      return {kDLFloat, 32, 1};
  }
}

/*! \brief Storage elements, as tensors count them, of `dim` elements. */
inline int64_t StorageExtent(ElementType type, int64_t dim) {
  return type == ElementType::kInt4 ? dim / 2 : dim;
}

inline std::string ShapeString(const DLTensor& t) {
  std::string s = "[";
  for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.shape[i]);
  return s + "]";
}

inline void* DataOf(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

/*!
 * \brief Check an argument's dtype and device, and that it is contiguous.
 * \param name The argument, as the caller knows it.
 */
inline void CheckContiguous(const char* name, const DLTensor& t, DLDataType dtype,
                            DLDevice device) {
  using tvm::ffi::DLDataTypeToString;
  TVM_FLASHINFER_CHECK(t.dtype == dtype, TypeError)
      << "argument `" << name << "` has dtype " << DLDataTypeToString(t.dtype) << ", expected "
      << DLDataTypeToString(dtype);
  TVM_FLASHINFER_CHECK(
      t.device.device_type == device.device_type && t.device.device_id == device.device_id,
      ValueError)
      << "argument `" << name << "` is on device (" << static_cast<int>(t.device.device_type)
      << ", " << t.device.device_id << "), expected (" << static_cast<int>(device.device_type)
      << ", " << device.device_id << ")";
  TVM_FLASHINFER_CHECK(tvm::ffi::IsContiguous(t), ValueError)
      << "argument `" << name << "` of shape " << ShapeString(t) << " is not contiguous";
}

/*!
 * \brief The same and its shape; -1 in `shape` accepts any extent.
 *
 * Leading extents of 1 beyond the expected rank are accepted: models keep a batch axis of 1.
 */
template <typename Extents = std::initializer_list<int64_t>>
void CheckTensor(const char* name, const DLTensor& t, DLDataType dtype, DLDevice device,
                 const Extents& shape) {
  CheckContiguous(name, t, dtype, device);
  const int rank = static_cast<int>(shape.size());
  const int extra = t.ndim - rank;
  bool ok = extra >= 0;
  for (int i = 0; ok && i < extra; ++i) ok = t.shape[i] == 1;
  std::string expected = "[";
  int axis = 0;
  for (int64_t extent : shape) {
    ok = ok && (extent < 0 || t.shape[extra + axis] == extent);
    expected += (axis ? ", " : "") + (extent < 0 ? std::string("n") : std::to_string(extent));
    ++axis;
  }
  TVM_FLASHINFER_CHECK(ok, ValueError) << "argument `" << name << "` has shape " << ShapeString(t)
                                       << ", expected " << expected << "]";
}

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_TENSOR_VIEW_H_
