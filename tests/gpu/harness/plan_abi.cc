// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The scheduler behind a C interface, for tests and benches that have no TVM.
#include <tvm_flashinfer/params.h>
#include <tvm_flashinfer/schedule.h>

#include <cstdio>
#include <exception>

using namespace tvm_flashinfer;

namespace {
thread_local char message[256];
}

extern "C" int64_t harness_params_size() { return sizeof(AttentionParams); }
extern "C" int64_t harness_input_size() { return sizeof(ScheduleInput); }
extern "C" int64_t harness_level_size() { return sizeof(LayoutLevel); }

/*! \param out [total, max_items, max_partials] */
extern "C" void harness_plan_layout(const PlanBounds* bounds, int64_t* out) {
  const PlanLayout layout = PlanLayout::Make(*bounds);
  out[0] = layout.total;
  out[1] = layout.max_items;
  out[2] = layout.max_partials;
}

extern "C" void* harness_scheduler_create(const PlanBounds* bounds) {
  return new Scheduler(*bounds);
}
extern "C" void harness_scheduler_destroy(void* scheduler) {
  delete static_cast<Scheduler*>(scheduler);
}

extern "C" const char* harness_plan(void* scheduler, const ScheduleInput* input, int32_t* buffer) {
  try {
    static_cast<Scheduler*>(scheduler)->Plan(*input, buffer);
    return nullptr;
  } catch (const std::exception& e) {
    std::snprintf(message, sizeof(message), "%s", e.what());
    return message;
  }
}

extern "C" double harness_imbalance(void* scheduler) {
  return static_cast<Scheduler*>(scheduler)->imbalance();
}

/*! \brief Point `params->plan` into a plan buffer at `base`, in host or device memory. */
extern "C" void harness_set_plan(AttentionParams* params, const int32_t* base,
                                 const PlanBounds* bounds) {
  params->plan = PlanView::Make(base, PlanLayout::Make(*bounds), *bounds);
}
