// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Prints how often the scheduler allocates in 100 plans of growing batches, after its creation.
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include <tvm_flashinfer/schedule.h>

namespace {
long allocations = 0;
}  // namespace

void* operator new(std::size_t size) {
  ++allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

int main() {
  using namespace tvm_flashinfer;
  constexpr int32_t kRequests = 256, kPages = 512;
  PlanBounds bounds;
  bounds.max_requests = kRequests;
  bounds.max_q_tokens = kRequests * 8;
  bounds.max_kv_pages = kRequests * kPages;
  bounds.num_workers = 132;
  bounds.num_kv_heads = 8;
  bounds.max_tile_tokens = 16;
  Scheduler scheduler(bounds);
  std::vector<int32_t> buffer(scheduler.layout().total), qo_indptr(kRequests + 1),
      kv_indptr(kRequests + 1), indices(kRequests * kPages), last(kRequests, 3), lengths(kRequests);
  const long before = allocations;
  for (int32_t step = 0; step < 100; ++step) {
    ScheduleInput in;
    in.num_requests = 1 + step * 255 / 99;
    for (int32_t r = 0; r < in.num_requests; ++r) {
      const int32_t pages = 1 + (r * 7919 + step) % kPages;
      qo_indptr[r + 1] = qo_indptr[r] + r % 8;
      kv_indptr[r + 1] = kv_indptr[r] + pages;
      lengths[r] = (pages - 1) * 16 + 3;
    }
    LayoutLevel level;
    level.num_rows = in.num_requests;
    level.qo_indptr = qo_indptr.data();
    level.kv_indptr = kv_indptr.data();
    level.kv_indices = indices.data();
    level.last_block_len = last.data();
    in.qo_indptr = qo_indptr.data();
    in.kv_len = lengths.data();
    in.levels = &level;
    in.page_size = 16;
    in.group = 4;
    in.tile_tokens = 16;
    in.shared_queue = step % 2 == 0;
    scheduler.Plan(in, buffer.data());
  }
  std::printf("%ld\n", allocations - before);
  return 0;
}
