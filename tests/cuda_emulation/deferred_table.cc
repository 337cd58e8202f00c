// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The emulated kernel table behind a stream that runs late: what is launched waits until someone
// waits for an event, or until `flush`. So a host that overwrites what is still to be read shows.
#include <tvm/ffi/function.h>
#include <tvm_flashinfer/cuda/kernel.h>

#include <cstdint>
#include <deque>
#include <functional>

const tvm_flashinfer::CudaKernel* emulated_table();

namespace {

using tvm_flashinfer::AttentionParams;
using tvm_flashinfer::CudaAppendParams;
using tvm_flashinfer::CudaKernel;
using tvm_flashinfer::CudaMergeParams;
using tvm_flashinfer::CudaMoveParams;

std::deque<std::function<const char*()>> stream;

const char* Launch(std::function<const char*()> work) {
  stream.push_back(std::move(work));
  return nullptr;
}

const char* RunWhile(const std::function<bool()>& waiting) {
  while (!stream.empty() && waiting()) {
    const std::function<const char*()> work = std::move(stream.front());
    stream.pop_front();
    if (const char* error = work()) return error;
  }
  return nullptr;
}

/*! Places of a stream that were marked and not reached yet. */
struct Event {
  int pending = 0;
};

const char* Run(const AttentionParams* params, int32_t tile, int32_t workers, void*) {
  return Launch([params = *params, tile, workers] {
    return emulated_table()->run(&params, tile, workers, nullptr);
  });
}
const char* Append(const CudaAppendParams* params, int32_t tokens, void*) {
  return Launch(
      [params = *params, tokens] { return emulated_table()->append(&params, tokens, nullptr); });
}
const char* Merge(const CudaMergeParams* params, void*) {
  return Launch([params = *params] { return emulated_table()->merge(&params, nullptr); });
}
const char* Move(const CudaMoveParams* params, void*) {
  return Launch([params = *params] { return emulated_table()->move(&params, nullptr); });
}
const char* Copy(void* to, const void* from, int64_t bytes, void*) {
  return Launch([=] { return emulated_table()->copy(to, from, bytes, nullptr); });
}
const char* EventCreate(void** event) {
  *event = new Event();
  return nullptr;
}
const char* EventRecord(void* event, void*) {
  ++static_cast<Event*>(event)->pending;
  return Launch([event]() -> const char* {
    --static_cast<Event*>(event)->pending;
    return nullptr;
  });
}
const char* EventWait(void* event) {
  return RunWhile([event] { return static_cast<Event*>(event)->pending > 0; });
}
void EventDestroy(void* event) { delete static_cast<Event*>(event); }

void* Table() {
  static CudaKernel table = *emulated_table();
  table.run = Run;
  table.append = Append;
  table.merge = Merge;
  table.move = Move;
  table.copy = Copy;
  table.event_create = EventCreate;
  table.event_record = EventRecord;
  table.event_wait = EventWait;
  table.event_destroy = EventDestroy;
  return &table;
}

int64_t Pending() { return static_cast<int64_t>(stream.size()); }
bool Flush() {
  return RunWhile([] { return true; }) == nullptr;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(deferred, Table);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pending, Pending);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(flush, Flush);
