// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The composable format of a cache's steps: who chooses it, and what was chosen.
#include <tvm/ffi/reflection/registry.h>

#include <algorithm>
#include <string>

#include "check.h"
#include "kv_cache.h"

namespace tvm_flashinfer {

void KVCacheObj::UseFormat(FormatChoice choice) {
  config_.format = choice;  // of runners that are made later
  for (StepRunner* runner : {runner_.get(), past_.get(), masked_.get()}) {
    if (runner != nullptr) runner->UseFormat(choice);
  }
  for (LayerGroup& group : groups_) group.runner->UseFormat(choice);
}

void StepRunner::PoisonWorkspace() {
  TVM_FFI_THROW(NotImplementedError) << "this cache's workspace is not on a GPU";
}

void KVCacheObj::PoisonWorkspace() {
  for (StepRunner* runner : {runner_.get(), past_.get(), own_.get(), masked_.get()}) {
    if (runner != nullptr) runner->PoisonWorkspace();
  }
  for (LayerGroup& group : groups_) group.runner->PoisonWorkspace();
}

Tensor KVCacheObj::PlanSectionOf(const std::string& name) const {
  const PlanOnHost plan = runner_->LastPlan();
  TVM_FLASHINFER_CHECK(plan.buffer != nullptr, RuntimeError)
      << "there is no plan before the first begin_forward";
  for (int32_t i = 0; i < PlanLayout::kNumSections; ++i) {
    const auto section = static_cast<PlanSection>(i);
    if (name != PlanSectionName(section)) continue;
    const Tensor copy = Tensor::Empty({plan.layout->Size(section)}, {kDLInt, 32, 1}, {kDLCPU, 0});
    // Page ids come last, and only those in use are kept.
    const int64_t size = section == PlanSection::kKVIndices
                             ? reinterpret_cast<const PlanHeader*>(plan.buffer)->num_kv_pages
                             : plan.layout->Size(section);
    std::copy_n(plan.buffer + plan.layout->Offset(section), size,
                static_cast<int32_t*>(copy->data));
    return copy;
  }
  TVM_FFI_THROW(ValueError) << "argument `name` is \"" << name
                            << "\", expected a section of the plan, see plan.h";
  __builtin_unreachable();
}

namespace {

using tvm::runtime::vm::AttentionKVCache;

void UseFormat(AttentionKVCache cache, std::string choice) {
  const char* const names[] = {"auto", "flat", "shared"};
  const auto* found = std::find(std::begin(names), std::end(names), choice);
  TVM_FLASHINFER_CHECK(found != std::end(names), ValueError)
      << "argument `format` is \"" << choice << "\", expected \"auto\", \"flat\" or \"shared\"";
  Ours(cache)->UseFormat(static_cast<FormatChoice>(found - names));
}

void PoisonWorkspace(AttentionKVCache cache) { Ours(cache)->PoisonWorkspace(); }

Tensor PlanSectionOf(AttentionKVCache cache, std::string name) {
  return Ours(cache)->PlanSectionOf(name);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("tvm_flashinfer.kv_cache_use_format", UseFormat)
      .def("tvm_flashinfer.kv_cache_poison_workspace", PoisonWorkspace)
      .def("tvm_flashinfer.kv_cache_plan_section", PlanSectionOf);
}

}  // namespace
}  // namespace tvm_flashinfer
