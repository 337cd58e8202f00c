// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.

/*!
 * \file abi.cc
 * \brief `tvm_flashinfer.build_info()`: what this library was compiled from and against.
 *
 * The KV cache derives from a class whose virtual table changes between TVM releases, so the
 * library is good for one TVM only. Python compares the same facts, kept in a file beside the
 * library, before it loads the library (tvm_flashinfer/_library.py); this function tells them of
 * the loaded one.
 */
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/ffi/string.h>

#include "tvm_flashinfer_build_info.h"

namespace tvm_flashinfer {
namespace {

using tvm::ffi::Map;
using tvm::ffi::String;

Map<String, String> BuildInfo() {
  return {{"project_version", TVM_FLASHINFER_VERSION},
          {"tvm_version", TVM_FLASHINFER_TVM_VERSION},
          {"tvm_ffi_version", TVM_FLASHINFER_TVM_FFI_VERSION},
          {"kv_state_sha256", TVM_FLASHINFER_KV_STATE_SHA256},
          {"compiler", TVM_FLASHINFER_COMPILER},
          {"build_type", TVM_FLASHINFER_BUILD_TYPE}};
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def("tvm_flashinfer.build_info", BuildInfo);
}

}  // namespace
}  // namespace tvm_flashinfer
