// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Preloaded into a test's process: an allocation of libtvm_flashinfer.so fails when it is told to.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace {

thread_local long countdown = 0;  // 0: none is to fail
thread_local bool fired = false;

bool Fails(void* caller) {
  if (countdown == 0) return false;
  const long left = countdown;
  countdown = 0;  // dladdr may allocate
  Dl_info info{};
  const bool ours = dladdr(caller, &info) != 0 && info.dli_fname != nullptr &&
                    std::strstr(info.dli_fname, "libtvm_flashinfer") != nullptr;
  countdown = ours ? left - 1 : left;
  fired = ours && countdown == 0;
  return fired;
}

void* Allocate(std::size_t bytes, std::size_t alignment, void* caller) {
  void* memory = nullptr;
  if (!Fails(caller)) {
    memory = alignment == 0
                 ? std::malloc(bytes == 0 ? 1 : bytes)
                 : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  }
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

extern "C" {
/*! \brief The n-th allocation from now on fails, in this thread; 0: none does. */
void fail_allocation(long n) {
  countdown = n;
  fired = false;
}
int allocation_failed() { return fired; }
}

#define CALLER __builtin_return_address(0)
void* operator new(std::size_t n) { return Allocate(n, 0, CALLER); }
void* operator new[](std::size_t n) { return Allocate(n, 0, CALLER); }
void* operator new(std::size_t n, std::align_val_t a) {
  return Allocate(n, static_cast<std::size_t>(a), CALLER);
}
void* operator new[](std::size_t n, std::align_val_t a) {
  return Allocate(n, static_cast<std::size_t>(a), CALLER);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
