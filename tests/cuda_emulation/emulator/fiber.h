// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Stackful fibers: a switch costs a few nanoseconds on x86-64, and a system call elsewhere.
#ifndef TVM_FLASHINFER_EMULATOR_FIBER_H_
#define TVM_FLASHINFER_EMULATOR_FIBER_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

#if defined(__x86_64__)
// Saves the callee-saved registers on the running stack, its pointer in *from, and resumes `to`.
extern "C" void tvm_flashinfer_fiber_switch(void** from, void* to);
asm(R"(
.text
.local tvm_flashinfer_fiber_switch
.type tvm_flashinfer_fiber_switch, @function
tvm_flashinfer_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tvm_flashinfer_fiber_switch, .-tvm_flashinfer_fiber_switch
)");
#endif

/*! \brief A stack and where it stopped. One of them, without a stack, stands for the caller. */
class Fiber {
 public:
  Fiber() = default;

  /*! \param entry Never returns: it switches away for good when done. */
  void Start(void (*entry)()) {
    if (!stack_) stack_.reset(new uint8_t[kStackBytes]);
#if defined(__x86_64__)
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) & ~uintptr_t{15};
    auto* slots = reinterpret_cast<void**>(top - 8 * sizeof(void*));
    for (int i = 0; i < 6; ++i) slots[i] = nullptr;
    slots[6] = reinterpret_cast<void*>(entry);
    slots[7] = nullptr;
    pointer_ = slots;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  /*! \brief Stop `from` here and go on with `to`. */
  static void Switch(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
    tvm_flashinfer_fiber_switch(&from.pointer_, to.pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;
  std::unique_ptr<uint8_t[]> stack_;
#if defined(__x86_64__)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace emulation

#endif  // TVM_FLASHINFER_EMULATOR_FIBER_H_
