// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "variant_args.h"

#include <tvm/ffi/container/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "check.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::ffi::Array;
using tvm::ffi::PackedArgs;
using tvm::ffi::Tensor;

DLDataType DTypeOf(VariantType type) {
  switch (type) {
    case VariantType::kFloat32:
      return {kDLFloat, 32, 1};
    case VariantType::kInt32:
      return {kDLInt, 32, 1};
    case VariantType::kFloat16:
      return {kDLFloat, 16, 1};
    case VariantType::kBFloat16:
      return {kDLBfloat, 16, 1};
    case VariantType::kInt8:
      return {kDLInt, 8, 1};
    case VariantType::kUInt8:
      return {kDLUInt, 8, 1};
    default:
      return {kDLBool, 8, 1};
  }
}

VariantArg BindScalar(const VariantParam& param, AnyView value) {
  VariantArg arg{};
  if (param.type == VariantType::kInt32) {
    const auto given = value.try_cast<int64_t>();
    TVM_FLASHINFER_CHECK(given.has_value(), TypeError)
        << "parameter `" << param.name << "` is a " << value.GetTypeKey()
        << ", expected an integer";
    TVM_FLASHINFER_CHECK(*given >= INT32_MIN && *given <= INT32_MAX, ValueError)
        << "parameter `" << param.name << "` is " << *given << ", expected an int32";
    arg.i = static_cast<int32_t>(*given);
    return arg;
  }
  const auto given = value.try_cast<double>();
  TVM_FLASHINFER_CHECK(given.has_value(), TypeError)
      << "parameter `" << param.name << "` is a " << value.GetTypeKey() << ", expected a number";
  TVM_FLASHINFER_CHECK(!std::isnan(*given), ValueError)
      << "parameter `" << param.name << "` is NaN";
  arg.f = static_cast<float>(*given);
  return arg;
}

VariantArg BindTensor(const VariantParam& param, AnyView value, DLDevice device) {
  const auto given = value.try_cast<Tensor>();
  TVM_FLASHINFER_CHECK(given.has_value(), TypeError)
      << "parameter `" << param.name << "` is a " << value.GetTypeKey() << ", expected a tensor";
  const DLTensor& t = *given->GetDLTensorPtr();
  TVM_FLASHINFER_CHECK(t.ndim == param.num_dims, ValueError)
      << "parameter `" << param.name << "` has shape " << ShapeString(t) << ", expected "
      << param.num_dims << " axes";
  TVM_FLASHINFER_CHECK(t.dtype == DTypeOf(param.type), TypeError)
      << "parameter `" << param.name << "` has dtype " << tvm::ffi::DLDataTypeToString(t.dtype)
      << ", expected " << tvm::ffi::DLDataTypeToString(DTypeOf(param.type));
  TVM_FLASHINFER_CHECK(t.device.device_type == device.device_type, ValueError)
      << "parameter `" << param.name << "` is not on the "
      << (device.device_type == kDLCPU ? "CPU" : "GPU that attention runs on");
  TVM_FLASHINFER_CHECK(tvm::ffi::IsContiguous(t), ValueError)
      << "parameter `" << param.name << "` of shape " << ShapeString(t) << " is not contiguous";
  VariantArg arg{};
  arg.data = DataOf(t);
  for (int32_t& extent : arg.extent) extent = 1;
  int64_t elements = 1;
  for (int i = 0; i < t.ndim; ++i) {
    arg.extent[i] = static_cast<int32_t>(t.shape[i]);
    elements *= t.shape[i];
  }
  TVM_FLASHINFER_CHECK(elements <= std::numeric_limits<int32_t>::max(), ValueError)
      << "parameter `" << param.name << "` has " << elements
      << " elements, kernels index at most 2^31 - 1";
  return arg;
}

/*! \param value The i-th value, as an AnyView. */
template <typename Value>
VariantArgs BindAll(const KernelTraits& kernel, int32_t count, DLDevice device,
                    const Value& value) {
  TVM_FLASHINFER_CHECK(count == kernel.num_params, ValueError)
      << "argument `params` has " << count << " values, the variant declares " << kernel.num_params;
  VariantArgs args{};
  for (int32_t i = 0; i < count; ++i) {
    const VariantParam& param = kernel.params[i];
    args.arg[i] =
        param.num_dims == 0 ? BindScalar(param, value(i)) : BindTensor(param, value(i), device);
  }
  return args;
}

}  // namespace

void BoundVariantArgs::Bind(const KernelTraits& kernel, const Array<Any>& values, DLDevice device) {
  args_ = BindAll(kernel, static_cast<int32_t>(values.size()), device,
                  [&](int32_t i) -> AnyView { return *(values.begin() + i); });
  count_ = kernel.num_params;
  values_ = values;
  checked_plan_ = -1;
}

void BoundVariantArgs::Bind(const KernelTraits& kernel, PackedArgs values, DLDevice device) {
  args_ = BindAll(kernel, values.size(), device, [&](int32_t i) { return values[i]; });
  count_ = kernel.num_params;
  checked_plan_ = -1;
}

const VariantArgs* BoundVariantArgs::Get(const KernelTraits& kernel) const {
  TVM_FLASHINFER_CHECK(count_ == kernel.num_params || kernel.num_params == 0, ValueError)
      << "the variant's parameters are not set: it declares " << kernel.num_params
      << ", the first is `" << kernel.params[0].name << "`";
  return &args_;
}

const VariantArgs* BoundVariantArgs::Get(const KernelTraits& kernel, const VisitedRange& range,
                                         int64_t plan) {
  Get(kernel);
  if (plan >= 0 && plan == checked_plan_) return &args_;
  const ElementIndex<Interval>& at = range.elements;
  const int32_t outside = kernel.out_of_bounds_param(&args_, &range);
  const auto shape = [&] {
    std::string s;
    for (int32_t i = 0; i < kernel.params[outside].num_dims; ++i) {
      s += (i ? ", " : "[") + std::to_string(args_.arg[outside].extent[i]);
    }
    return s + "]";
  };
  TVM_FLASHINFER_CHECK(outside < 0, ValueError)
      << "parameter `" << kernel.params[outside].name << "` has shape " << shape()
      << ", too small for what this plan indexes: " << at.request.hi + 1
      << " requests, positions up to " << std::max(at.q_idx.hi, at.kv_idx.hi) << ", "
      << at.q_head.hi + 1 << " query heads, " << range.q_rows.hi + 1
      << " query tokens, places in the pool up to " << range.kv_slots.hi;
  if (plan >= 0) checked_plan_ = plan;
  return &args_;
}

}  // namespace tvm_flashinfer
