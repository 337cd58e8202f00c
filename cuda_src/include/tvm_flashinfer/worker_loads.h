// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#ifndef TVM_FLASHINFER_WORKER_LOADS_H_
#define TVM_FLASHINFER_WORKER_LOADS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tvm_flashinfer {

/*! \brief A heap of workers by what they have been given: the cheapest, then the lowest, on top. */
class WorkerLoads {
 public:
  struct Load {
    int64_t cost;
    int32_t worker;
    bool operator<(const Load& o) const {
      return cost != o.cost ? cost < o.cost : worker < o.worker;
    }
  };

  explicit WorkerLoads(int32_t num_workers) : heap_(num_workers) {}

  void Clear() {
    for (size_t w = 0; w < heap_.size(); ++w) heap_[w] = {0, static_cast<int32_t>(w)};
  }

  /*! \brief Give the cheapest worker something that costs no less than 0; its load afterwards. */
  Load Give(int64_t cost) {
    const Load load = {heap_[0].cost + cost, heap_[0].worker};
    const size_t n = heap_.size();
    size_t hole = 0;
    for (size_t child = 1; child < n; child = 2 * hole + 1) {
      if (child + 1 < n && heap_[child + 1] < heap_[child]) ++child;
      if (!(heap_[child] < load)) break;
      heap_[hole] = heap_[child];
      hole = child;
    }
    heap_[hole] = load;
    return load;
  }

 private:
  std::vector<Load> heap_;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_WORKER_LOADS_H_
