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
#include <map>
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
constexpr int kWarpgroup = 128;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

/*! \brief A cp.async not yet performed; of zeros, if it comes from nowhere. */
struct PendingCopy {
  uint8_t* to;
  const void* from;

  void Perform() const {
    if (from == nullptr) {
      std::memset(to, 0, 16);
    } else {
      std::memcpy(to, from, 16);
    }
  }
};

/*! \brief One thread's part of a warpgroup's product not yet performed (wgmma_emulation.h). */
struct PendingProduct {
  float* c;        //!< accumulators, by eight columns four of them
  int columns;     //!< n
  uint32_t a[4];   //!< fragment, if a is not in shared memory
  uint64_t a_at;   //!< descriptor, or 0
  uint64_t b_at;   //!< descriptor
  bool transpose;  //!< b is stored [k, n]
  bool accumulate;
  int type;  //!< of the elements: opaque here
};

struct Thread {
  Fiber fiber;
  int index = 0;
  bool done = false;
  const char* waiting = nullptr;
  const uint64_t* watched = nullptr;  //!< blocked until this differs from `seen` under `mask`
  uint64_t seen = 0, mask = 0;

  bool Ready() const { return watched == nullptr || (*watched & mask) != seen; }
  std::vector<PendingCopy> copies;                         //!< not yet tied to a barrier
  std::vector<PendingProduct> products;                    //!< not yet committed
  std::deque<std::vector<PendingProduct>> product_groups;  //!< not yet waited for
};

/*! \brief Counts arrivals; completes, and starts over, at the expected number. */
struct Rendezvous {
  int arrived = 0;
  uint64_t generation = 0;
  const char* what = nullptr;
  void* operands[kLanes] = {};
};

/*! \brief An mbarrier: phases of `expected` arrivals, and the copies that end with the phase. */
struct MbarrierState {
  int expected = 0;
  int pending = 0;
  int64_t bytes = 0;  //!< expected and not yet on their way
  uint64_t phase = 0;
  std::vector<PendingCopy> copies;

  void Init(int count) {
    expected = pending = count;
    bytes = 0;
    phase = 0;
  }
  void Arrive() {
    --pending;
    TryComplete();
  }
  /*! \brief Copies of as many bytes were issued (or, negative, announced). */
  void CountBytes(int64_t count) {
    bytes -= count;
    TryComplete();
  }
  void TryComplete() {
    if (pending > 0 || bytes != 0) return;
    for (const PendingCopy& copy : copies) copy.Perform();
    copies.clear();
    pending = expected;
    ++phase;
  }
  bool Completed(int parity) const { return static_cast<int>(phase & 1) != parity; }
};

/*! \brief The block that runs now. */
class Block {
 public:
  static Block& Current() { return *current_; }

  Block(int threads, size_t shared_bytes, unsigned grid)
      : threads_(threads),
        warps_(threads / kLanes),
        warpgroups_(threads / kWarpgroup),
        shared_bytes_(shared_bytes),
        grid_(grid) {
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
      t.watched = nullptr;
      t.copies.clear();
      t.products.clear();
      t.product_groups.clear();
      t.fiber.Start(&Block::Entry);
    }
    for (Rendezvous& w : warps_) w = Rendezvous{};
    for (Rendezvous& g : warpgroups_) g = Rendezvous{};
    for (Rendezvous& b : barriers_) b = Rendezvous{};
    mbarriers_.clear();
    finished_ = 0;
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

  /*! \brief All threads of a warpgroup meet; the last to arrive computes for `Thread* first` on. */
  template <typename F>
  void Warpgroup(const char* what, F compute) {
    const size_t group = thread().index / kWarpgroup;
    if (group >= warpgroups_.size()) Fail(std::string(what) + " outside a whole warpgroup");
    Thread* first = &threads_[group * kWarpgroup];
    Meet(warpgroups_[group], kWarpgroup, what, [&] { compute(first); });
  }

  MbarrierState& Mbarrier(uint32_t address) {
    Shared(address, 8);
    return mbarriers_[address];
  }

  void WaitMbarrier(uint32_t address, int parity) {
    MbarrierState& b = Mbarrier(address);
    if (!b.Completed(parity)) Suspend("mbarrier", &b.phase, static_cast<uint64_t>(parity), 1);
  }

  void Barrier(int id, int count) {
    if (id < 0 || id > 15) Fail("barrier ids are 0 to 15");
    Meet(barriers_[id], count, "barrier", [] {});
  }

  /*! \brief Arrive at a barrier that others wait at. */
  void BarrierArrive(int id, int count) {
    if (id < 0 || id > 15) Fail("barrier ids are 0 to 15");
    Rendezvous& r = barriers_[id];
    if (++r.arrived < count) return;
    r.arrived = 0;
    ++r.generation;
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
      return;
    }
    Suspend(what, &r.generation, r.generation, ~uint64_t{0});
  }

  void Suspend(const char* what, const uint64_t* watched, uint64_t seen, uint64_t mask) {
    Thread& self = thread();
    self.waiting = what;
    self.watched = watched;
    self.seen = seen;
    self.mask = mask;
    if (!self.Ready()) {
      Thread& to = Next();
      if (&to != &self) Fiber::Switch(self.fiber, to.fiber);
    }
    self.waiting = nullptr;
    self.watched = nullptr;
  }

  /*! \brief The next thread that can run. */
  Thread& Next() {
    const size_t self = cursor_;
    do {
      cursor_ = (cursor_ + 1) % order_.size();
      if (!thread().done && thread().Ready()) return thread();
    } while (cursor_ != self);
    Fail("deadlock: " + Waiting());
  }

  std::string Waiting() const {
    std::string text;
    for (size_t w = 0; w < warps_.size(); ++w) {
      const Thread& t = threads_[w * kLanes];
      text += "warp " + std::to_string(w) + " " +
              (t.done      ? "exited"
               : t.waiting ? t.waiting
                           : "runs") +
              "; ";
    }
    return text;
  }

  static void Entry() {
    Block& b = Current();
    (*b.body_)();
    Thread& self = b.thread();
    self.done = true;
    if (++b.finished_ == b.num_threads()) Fiber::Switch(self.fiber, b.caller_);
    Fiber::Switch(self.fiber, b.Next().fiber);
  }

  inline static Block* current_ = nullptr;
  Fiber caller_;
  std::vector<Thread> threads_;
  std::vector<Rendezvous> warps_, warpgroups_;
  Rendezvous barriers_[16];
  std::map<uint32_t, MbarrierState> mbarriers_;
  std::vector<uint8_t> storage_;
  uint8_t* shared_ = nullptr;
  size_t shared_bytes_;
  unsigned grid_;
  unsigned block_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::vector<int> order_;
  size_t cursor_ = 0;
  int finished_ = 0;
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

inline unsigned __ballot_sync(unsigned, int predicate) {
  struct Operand {
    int predicate;
    unsigned result;
  } self{predicate, 0};
  emulation::Block::Current().Warp("__ballot_sync", &self, [](void** all) {
    unsigned bits = 0;
    for (int i = 0; i < emulation::kLanes; ++i) {
      bits |= static_cast<unsigned>(static_cast<Operand*>(all[i])->predicate != 0) << i;
    }
    for (int i = 0; i < emulation::kLanes; ++i) static_cast<Operand*>(all[i])->result = bits;
  });
  return self.result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <typename T>
inline T __shfl_sync(unsigned, T value, int lane, int width = emulation::kLanes) {
  struct Operand {
    T value, result;
    int lane;
  } self{value, T{}, static_cast<int>(threadIdx.x) / width * width + lane % width};
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
