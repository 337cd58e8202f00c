// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "batch_attention_check.h"

#include <tvm/ffi/dtype.h>

#include <algorithm>

#include "check.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

/*! Extents print as [2, n, 64]: -1 stands for any. */
struct Extents {
  const int64_t* begin;
  int count;
};
std::ostream& operator<<(std::ostream& out, const Extents& e) {
  out << "[";
  for (int i = 0; i < e.count; ++i) {
    out << (i ? ", " : "");
    if (e.begin[i] < 0) {
      out << "n";
    } else {
      out << e.begin[i];
    }
  }
  return out << "]";
}

Extents ShapeOf(const TensorView& t) { return {t.shape().data(), t.ndim()}; }
Extents StridesOf(const TensorView& t) { return {t.strides().data(), t.ndim()}; }

char* DataAt(const TensorView& t, int64_t elements = 0) {
  return static_cast<char*>(t.data_ptr()) + t.byte_offset() + elements * (t.dtype().bits / 8);
}

struct DeviceName {
  DLDevice device;
};
std::ostream& operator<<(std::ostream& out, const DeviceName& name) {
  const DLDevice& d = name.device;
  if (d.device_type == kDLCPU) return out << "the CPU";
  if (d.device_type == kDLCUDA) return out << "CUDA device " << d.device_id;
  return out << "device (" << static_cast<int>(d.device_type) << ", " << d.device_id << ")";
}

void CheckType(ArgName arg, const TensorView& t, DLDataType dtype, DLDevice device) {
  using tvm::ffi::DLDataTypeToString;
  TVM_FLASHINFER_CHECK(t.dtype() == dtype, TypeError)
      << "argument `" << arg << "` has dtype " << DLDataTypeToString(t.dtype()) << ", expected "
      << DLDataTypeToString(dtype);
  const DLDevice given = t.device();
  TVM_FLASHINFER_CHECK(given.device_type == device.device_type &&
                           (device.device_type == kDLCPU || given.device_id == device.device_id),
                       ValueError)
      << "argument `" << arg << "` is on " << DeviceName{given} << ", expected "
      << DeviceName{device};
  const auto address = reinterpret_cast<uintptr_t>(DataAt(t));
  TVM_FLASHINFER_CHECK(t.numel() == 0 || address % (dtype.bits / 8) == 0, ValueError)
      << "argument `" << arg << "` starts at an address that is not a multiple of its element size";
}

void CheckUnitStride(ArgName arg, const TensorView& t) {
  const int last = t.ndim() - 1;
  TVM_FLASHINFER_CHECK(t.numel() == 0 || t.size(last) == 1 || t.stride(last) == 1, ValueError)
      << "argument `" << arg << "` of shape " << ShapeOf(t) << " has strides "
      << Extents{t.strides().data(), t.ndim()} << ", its last axis must be contiguous";
}

/*!
 * Stride of axes [0, rank) taken as one, outermost first.
 * \return false when they don't lie evenly.
 */
bool Collapse(const TensorView& t, int rank, int64_t* stride) {
  *stride = 0;
  bool found = false;
  int64_t inner = 1;  // extent of the axes already collapsed
  for (int axis = rank - 1; axis >= 0; --axis) {
    if (t.size(axis) == 1) continue;
    if (!found) {
      *stride = t.stride(axis);
      found = true;
    } else if (t.stride(axis) != inner * *stride) {
      return false;
    }
    inner *= t.size(axis);
  }
  return true;
}

int64_t LeadingExtent(const TensorView& t, int rank) {
  int64_t extent = 1;
  for (int axis = 0; axis < rank; ++axis) extent *= t.size(axis);
  return extent;
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const ArgName& arg) {
  if (arg.level >= 0) out << "levels[" << arg.level << "].";
  return out << arg.name;
}

IndexVector CheckIndexVector(ArgName arg, const TensorView& t, int64_t size) {
  CheckType(arg, t, {kDLInt, 32, 1}, {kDLCPU, 0});
  TVM_FLASHINFER_CHECK(t.ndim() == 1 && (size < 0 || t.size(0) == size), ValueError)
      << "argument `" << arg << "` has shape " << ShapeOf(t) << ", expected " << Extents{&size, 1};
  CheckUnitStride(arg, t);
  return {reinterpret_cast<const int32_t*>(DataAt(t)), t.size(0)};
}

void CheckIndptr(ArgName arg, const IndexVector& indptr) {
  TVM_FLASHINFER_CHECK(indptr.size >= 1, ValueError)
      << "argument `" << arg << "` is empty, expected one entry more than rows";
  TVM_FLASHINFER_CHECK(indptr[0] == 0, ValueError)
      << "argument `" << arg << "` starts with " << indptr[0] << ", expected 0";
  for (int64_t i = 1; i < indptr.size; ++i) {
    TVM_FLASHINFER_CHECK(indptr[i] >= indptr[i - 1], ValueError)
        << "argument `" << arg << "` decreases at index " << i << ": " << indptr[i - 1] << ", "
        << indptr[i];
  }
}

TokenView CheckTokens(ArgName arg, const TensorView& t, DLDataType dtype, int64_t tokens,
                      int64_t heads, int64_t dim, bool written, DLDevice device) {
  CheckType(arg, t, dtype, device);
  const int lead = t.ndim() - 2;
  const int64_t expected[] = {tokens, heads, dim};
  TVM_FLASHINFER_CHECK(lead >= 1 && LeadingExtent(t, lead) == tokens && t.size(lead) == heads &&
                           t.size(lead + 1) == dim,
                       ValueError)
      << "argument `" << arg << "` has shape " << ShapeOf(t) << ", expected "
      << Extents{expected, 3} << " (tokens, heads, dim)";
  CheckUnitStride(arg, t);
  TokenView view{DataAt(t), 0, t.stride(lead)};
  if (tokens == 0) return view;
  TVM_FLASHINFER_CHECK(Collapse(t, lead, &view.token_stride), ValueError)
      << "argument `" << arg << "` of shape " << ShapeOf(t) << " has strides " << StridesOf(t)
      << ", its tokens must lie evenly: a head-major tensor of several requests does not";
  if (written) {
    int64_t inner = heads > 1 ? view.head_stride : dim, inner_extent = heads;
    int64_t outer = tokens > 1 ? view.token_stride : inner * inner_extent;
    if (tokens > 1 && heads > 1 && outer < inner) {
      std::swap(inner, outer);
      inner_extent = tokens;
    }
    const bool apart =
        inner >= dim &&
        (tokens == 1 || heads == 1 ? outer >= dim : outer >= inner * (inner_extent - 1) + dim);
    TVM_FLASHINFER_CHECK(apart, ValueError)
        << "argument `" << arg << "` of shape " << ShapeOf(t) << " has strides " << StridesOf(t)
        << ", elements of an output must not overlap";
  }
  return view;
}

float* CheckLse(ArgName arg, const TensorView& t, int64_t tokens, int64_t heads, DLDevice device) {
  CheckType(arg, t, {kDLFloat, 32, 1}, device);
  const int lead = t.ndim() - 1;
  const int64_t expected[] = {tokens, heads};
  TVM_FLASHINFER_CHECK(lead >= 1 && LeadingExtent(t, lead) == tokens && t.size(lead) == heads,
                       ValueError)
      << "argument `" << arg << "` has shape " << ShapeOf(t) << ", expected "
      << Extents{expected, 2} << " (tokens, query heads)";
  TVM_FLASHINFER_CHECK(t.numel() == 0 || t.IsContiguous(), ValueError)
      << "argument `" << arg << "` of shape " << ShapeOf(t) << " has strides " << StridesOf(t)
      << ", it must be contiguous";
  return reinterpret_cast<float*>(DataAt(t));
}

PoolView CheckPool(ArgName arg, const TensorView& t, ElementType type, PoolOrder order,
                   PoolPart part, int64_t heads, int64_t head_dim, DLDevice device) {
  const DLDataType bytes{kDLUInt, 8, 1}, dtype = ToDLDataType(type);
  const int64_t dim = StorageExtent(type, head_dim);
  // Frameworks without a narrow type of their own hold it as bytes.
  CheckType(arg, t, dtype.bits == 8 && t.dtype() == bytes ? bytes : dtype, device);
  const int both = part == PoolPart::kAlone ? 0 : 1;
  const bool token_pages = both == 0 && t.ndim() == 3;
  const bool nhd = order == PoolOrder::kNHD;
  // Axes of the page, of the head and of the token in a page.
  const int page_axis = token_pages && !nhd ? 1 : 0;
  const int head_axis = token_pages ? (nhd ? 1 : 0) : (nhd ? 2 : 1) + both;
  const int token_axis = token_pages ? -1 : (nhd ? 1 : 2) + both;
  const int rank = token_pages ? 3 : 4 + both;
  int64_t expected[5] = {-1, -1, -1, -1, -1};
  if (both) expected[1] = 2;
  expected[head_axis] = heads;
  expected[rank - 1] = dim;
  bool ok = t.ndim() == rank;
  for (int i = 0; ok && i < rank; ++i) ok = expected[i] < 0 || t.size(i) == expected[i];
  TVM_FLASHINFER_CHECK(ok, ValueError)
      << "argument `" << arg << "` has shape " << ShapeOf(t) << ", expected "
      << Extents{expected, rank} << " ("
      << (token_pages ? ""
          : both      ? "pages, 2, "
                      : "pages, ")
      << (token_pages ? (nhd ? "tokens, heads" : "heads, tokens")
                      : (nhd ? "page_size, heads" : "heads, page_size"))
      << ", dim)";
  CheckUnitStride(arg, t);
  PoolView view;
  view.data = DataAt(t, part == PoolPart::kValuesOfBoth ? t.stride(1) : 0);
  view.strides = {t.stride(page_axis), t.stride(head_axis),
                  token_pages ? t.stride(page_axis) : t.stride(token_axis)};
  view.num_pages = t.size(page_axis);
  view.page_size = token_pages ? 1 : t.size(token_axis);
  return view;
}

}  // namespace tvm_flashinfer
