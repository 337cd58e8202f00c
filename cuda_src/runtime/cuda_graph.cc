// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What a captured step needs around it: its key, and a way in and out of its fixed buffers. See
// relax_passes/capture.py.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstdint>
#include <vector>

#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Array;

uint64_t Mix(uint64_t hash, uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15u + (hash << 6) + (hash >> 2);
  hash *= 0xff51afd7ed558ccdu;
  return hash ^ hash >> 33;
}

uint64_t Mix(uint64_t hash, const Any& value) {
  if (auto tensor = value.as<tvm::ffi::Tensor>()) {
    return Mix(hash, reinterpret_cast<uintptr_t>(DataOf(*tensor->GetDLTensorPtr())));
  }
  if (auto array = value.as<Array<Any>>()) {
    for (const Any& element : *array) hash = Mix(hash, element);
    return hash;
  }
  if (auto extents = value.as<Shape>()) {  // a new object at every call
    for (int64_t extent : *extents) hash = Mix(hash, static_cast<uint64_t>(extent));
    return hash;
  }
  if (const auto* cache = value.as<KVCacheObj>()) {
    // A cache may be freed and another take its place: its plans never do.
    hash = Mix(hash, reinterpret_cast<uintptr_t>(cache));
    return Mix(hash, static_cast<uint64_t>(cache->GraphKey()));
  }
  if (const auto* object = value.as<tvm::ffi::Object>()) {
    return Mix(hash, reinterpret_cast<uintptr_t>(object));
  }
  return hash;
}

/*!
 * \brief Key of a captured region: its symbolic extents, then the identity of everything that it
 * reads at a fixed address. Two caches, two steps of one cache that launch differently, and two
 * sets of weights never share a graph.
 */
Shape GraphKey(Array<Any> args, Shape extents) {
  uint64_t hash = 0;
  for (const Any& arg : args) hash = Mix(hash, arg);
  std::vector<int64_t> key(extents.begin(), extents.end());
  key.push_back(static_cast<int64_t>(hash));
  return Shape(std::move(key));
}

/*! \brief Copy a tensor on the current stream, without waiting for it. */
void GraphCopy(Tensor from, Tensor to) {
  const DLDevice device = to->device;
  TVM_FLASHINFER_CHECK(from->device.device_type == device.device_type, ValueError)
      << "argument `from` is on device type " << static_cast<int>(from->device.device_type)
      << ", expected that of the compiled model, " << static_cast<int>(device.device_type);
  auto* api = tvm::runtime::DeviceAPI::Get(device);
  api->CopyDataFromTo(const_cast<DLTensor*>(from.operator->()),
                      const_cast<DLTensor*>(to.operator->()), api->GetCurrentStream(device));
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("tvm_flashinfer.graph_key", GraphKey)
      .def("tvm_flashinfer.graph_copy", GraphCopy);
}

}  // namespace
}  // namespace tvm_flashinfer
