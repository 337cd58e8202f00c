// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Runs CUDA kernels on a CPU: a thread is a fiber, barriers and warp-wide instructions are where
// fibers switch. Blocks run one after the other, so kernels whose blocks wait for each other hang,
// and are reported; data races are not found, but missing waits and divergent collectives are.
#ifndef TVM_FLASHINFER_EMULATOR_EMULATOR_H_
#define TVM_FLASHINFER_EMULATOR_EMULATOR_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define TVM_FLASHINFER_DYNAMIC_SHARED(name) \
  uint8_t* const name = ::emulation::Block::Current().shared()

using std::max;
using std::min;

namespace emulation {

constexpr int kLanes = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

/*! \brief A cp.async not yet performed. */
struct PendingCopy {
  uint8_t* to;
  const void* from;
};

struct Thread {
  Fiber fiber;
  int index = 0;
  bool done = false;
  const char* waiting = nullptr;
  std::deque<std::vector<PendingCopy>> groups;  //!< committed, oldest first
  std::vector<PendingCopy> open_group;
};

/*! \brief Counts arrivals; completes, and starts over, at the expected number. */
struct Rendezvous {
  int arrived = 0;
  uint64_t generation = 0;
  const char* what = nullptr;
  void* operands[kLanes] = {};
};

/*! \brief The block that runs now. */
class Block {
 public:
  static Block& Current() { return *current_; }

  Block(int threads, size_t shared_bytes, unsigned grid)
      : threads_(threads), warps_(threads / kLanes), shared_bytes_(shared_bytes), grid_(grid) {
    if (threads % kLanes != 0) throw std::runtime_error("a block must consist of whole warps");
    storage_.resize(shared_bytes + 1024);
    const auto base = reinterpret_cast<uintptr_t>(storage_.data());
    shared_ = storage_.data() + (1024 - base % 1024) % 1024;
  }

  /*! \param reversed Start threads in descending order: another legal interleaving. */
  void Run(unsigned block, bool reversed, const std::function<void()>& body) {
    current_ = this;
    block_ = block;
    body_ = &body;
    std::fill(storage_.begin(), storage_.end(), uint8_t{0xff});  // NaN in every float format
    const int n = static_cast<int>(threads_.size());
    order_.clear();
    for (int i = 0; i < n; ++i) order_.push_back(reversed ? n - 1 - i : i);
    for (int i = 0; i < n; ++i) {
      Thread& t = threads_[i];
      t.index = i;
      t.done = false;
      t.waiting = nullptr;
      t.groups.clear();
      t.open_group.clear();
      t.fiber.Start(&Block::Entry);
    }
    for (Rendezvous& w : warps_) w = Rendezvous{};
    for (Rendezvous& b : barriers_) b = Rendezvous{};
    finished_ = 0;
    idle_ = 0;
    cursor_ = 0;
    Fiber::Switch(caller_, threads_[order_[0]].fiber);
    if (!error_.empty()) {
      // Abandoned fibers hold stacks that no longer matter; their vectors die with the threads.
      throw std::runtime_error("block " + std::to_string(block) + ": " + error_);
    }
  }

  uint8_t* shared() { return shared_; }
  unsigned block() const { return block_; }
  unsigned grid() const { return grid_; }
  int num_threads() const { return static_cast<int>(threads_.size()); }
  Thread& thread() { return threads_[order_[cursor_]]; }

  /*! \brief Checked translation of a shared-window address. */
  uint8_t* Shared(uint32_t address, uint32_t bytes) {
    if (address % bytes != 0) Fail("misaligned shared-memory access");
    if (address + bytes > shared_bytes_) Fail("shared-memory access out of bounds");
    return shared_ + address;
  }

  /*! \brief All 32 lanes of a warp meet; the last to arrive computes for all. */
  template <typename F>
  void Warp(const char* what, void* operand, F compute) {
    const int index = thread().index;
    Rendezvous& w = warps_[index / kLanes];
    if (w.arrived == 0) {
      w.what = what;
    } else if (std::strcmp(w.what, what) != 0) {
      Fail(std::string("lanes of a warp diverge: ") + w.what + " and " + what);
    }
    w.operands[index % kLanes] = operand;
    Meet(w, kLanes, what, [&] { compute(w.operands); });
  }

  void Barrier(int id, int count) {
    if (id < 0 || id > 15) Fail("barrier ids are 0 to 15");
    Meet(barriers_[id], count, "barrier", [] {});
  }

  [[noreturn]] void Fail(const std::string& message) {
    error_ = "thread " + std::to_string(thread().index) + ": " + message;
    Fiber::Switch(thread().fiber, caller_);
    std::abort();  // a failed block is never resumed
  }

 private:
  template <typename F>
  void Meet(Rendezvous& r, int count, const char* what, F complete) {
    if (++r.arrived == count) {
      complete();
      r.arrived = 0;
      ++r.generation;
      idle_ = 0;
      return;
    }
    const uint64_t generation = r.generation;
    thread().waiting = what;
    while (r.generation == generation) Yield();
    thread().waiting = nullptr;
  }

  void Yield() {
    Thread& from = thread();
    if (++idle_ > 4 * num_threads()) Fail("deadlock: " + Waiting());
    Thread& to = Next();
    if (&to != &from) Fiber::Switch(from.fiber, to.fiber);
  }

  Thread& Next() {
    do {
      cursor_ = (cursor_ + 1) % order_.size();
    } while (thread().done);
    return thread();
  }

  std::string Waiting() const {
    std::string text;
    for (size_t w = 0; w < warps_.size(); ++w) {
      const Thread& t = threads_[w * kLanes];
      text += "warp " + std::to_string(w) + " " +
              (t.done ? "exited" : t.waiting ? t.waiting : "runs") + "; ";
    }
    return text;
  }

  static void Entry() {
    Block& b = Current();
    (*b.body_)();
    Thread& self = b.thread();
    self.done = true;
    b.idle_ = 0;
    if (++b.finished_ == b.num_threads()) Fiber::Switch(self.fiber, b.caller_);
    Fiber::Switch(self.fiber, b.Next().fiber);
  }

  inline static Block* current_ = nullptr;
  Fiber caller_;
  std::vector<Thread> threads_;
  std::vector<Rendezvous> warps_;
  Rendezvous barriers_[16];
  std::vector<uint8_t> storage_;
  uint8_t* shared_ = nullptr;
  size_t shared_bytes_;
  unsigned grid_;
  unsigned block_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::vector<int> order_;
  size_t cursor_ = 0;
  int finished_ = 0;
  int idle_ = 0;
  std::string error_;
};

/*!
 * \brief Run a grid.
 * \param reversed Blocks, and threads within them, in descending order.
 * \throws std::runtime_error on a deadlock, a divergent collective or a bad shared access.
 */
inline void Launch(unsigned grid, int threads, size_t shared_bytes, bool reversed,
                   const std::function<void()>& body) {
  Block block(threads, shared_bytes, grid);
  for (unsigned i = 0; i < grid; ++i) block.Run(reversed ? grid - 1 - i : i, reversed, body);
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return static_cast<unsigned>(Block::Current().thread().index); }
  } x;
};
struct BlockIndex {
  struct X {
    operator unsigned() const { return Block::Current().block(); }
  } x;
};

struct GridSize {
  struct X {
    operator unsigned() const { return Block::Current().grid(); }
  } x;
};

}  // namespace emulation

inline emulation::ThreadIndex threadIdx;
inline emulation::BlockIndex blockIdx;
inline emulation::GridSize gridDim;

inline void __syncthreads() {
  auto& block = emulation::Block::Current();
  block.Barrier(0, block.num_threads());
}
inline void __syncwarp() {
  emulation::Block::Current().Warp("__syncwarp", nullptr, [](void**) {});
}

inline int __any_sync(unsigned, int predicate) {
  struct Operand {
    int predicate, result;
  } self{predicate, 0};
  emulation::Block::Current().Warp("__any_sync", &self, [](void** all) {
    int any = 0;
    for (int i = 0; i < emulation::kLanes; ++i) any |= static_cast<Operand*>(all[i])->predicate;
    for (int i = 0; i < emulation::kLanes; ++i) static_cast<Operand*>(all[i])->result = any != 0;
  });
  return self.result;
}

template <typename T>
inline T __shfl_sync(unsigned, T value, int lane) {
  struct Operand {
    T value, result;
    int lane;
  } self{value, T{}, lane};
  emulation::Block::Current().Warp("__shfl_sync", &self, [](void** all) {
    for (int i = 0; i < emulation::kLanes; ++i) {
      auto* to = static_cast<Operand*>(all[i]);
      to->result = static_cast<Operand*>(all[to->lane % emulation::kLanes])->value;
    }
  });
  return self.result;
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, (static_cast<int>(threadIdx.x) % emulation::kLanes) ^ lanes);
}

#endif  // TVM_FLASHINFER_EMULATOR_EMULATOR_H_
