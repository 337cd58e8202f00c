// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "cuda_plan.h"

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/runtime/device_api.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "check.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::runtime::Tensor;

void* CurrentStream(DLDevice device) {
  if (device.device_type != kDLCUDA) return nullptr;  // a table that runs on the emulator
  tvm::runtime::DeviceAPI::Get(device)->SetDevice(device);
  return TVMFFIEnvGetStream(device.device_type, device.device_id);
}

void FillWithNaN(const Tensor& t) {
  int64_t bytes = t->dtype.bits / 8;
  for (int axis = 0; axis < t->ndim; ++axis) bytes *= t->shape[axis];
  const std::vector<char> ones(bytes, static_cast<char>(0xff));  // in every format a NaN
  Tensor(t).CopyFromBytes(ones.data(), ones.size());
}

void CheckCuda(const char* error, const char* what) {
  TVM_FLASHINFER_CHECK(error == nullptr, RuntimeError) << what << ": " << error;
}

int ChooseTile(const CudaKernel& kernel, const ScheduleInput& in) {
  if (in.num_levels == 1) {
    const int64_t requests = std::max(1, in.num_requests);
    const int64_t tokens = in.qo_indptr[in.num_requests];
    const int64_t mean = std::max<int64_t>(1, (tokens + requests - 1) / requests);
    int tile = kernel.num_tiles - 1;
    while (tile > 0 && kernel.tiles[tile - 1] >= mean * in.group) --tile;
    return tile;
  }
  int best = 0;
  int64_t least = -1;
  for (int tile = 0; tile < kernel.num_tiles; ++tile) {
    const int32_t rows = kernel.tiles[tile];
    if (rows < in.group) continue;
    const int64_t tokens = rows / in.group;
    int64_t cost = 0;
    for (int32_t l = 0; l < in.num_levels; ++l) {
      const LayoutLevel& level = in.levels[l];
      for (int32_t r = 0; r < level.num_rows; ++r) {
        const int64_t queries = level.qo_indptr[r + 1] - level.qo_indptr[r];
        cost += (queries + tokens - 1) / tokens * level.RowKVLen(r, in.page_size);
      }
    }
    cost *= kernel.tile_costs[tile];
    if (least >= 0 && cost >= least) continue;
    least = cost;
    best = tile;
  }
  return best;
}

void SetTileCosts(const CudaKernel& kernel, int tile, ScheduleInput* in) {
  in->compute_rows = kernel.tiles[tile];
  if (in->num_levels > 1) {
    in->item_overhead = 256;  // 4 us on an H100
  } else if (kernel.head_dim_vo > 256 && kernel.tiles[tile] > 16) {
    in->item_overhead = 512;  // a state of 64 rows is 128 KiB to write and to merge
  }
}

int32_t HeadParts(const CudaKernel& kernel, int32_t num_qo_heads, int32_t num_kv_heads) {
  const int32_t group = num_qo_heads / num_kv_heads;
  const int32_t largest = kernel.tiles[kernel.num_tiles - 1];
  int32_t parts = 1;
  while (group % parts != 0 || group / parts > largest) ++parts;
  TVM_FLASHINFER_CHECK(parts == 1 || (num_kv_heads == 1 && kernel.num_params == 0), ValueError)
      << "num_qo_heads / num_kv_heads is " << group << ", the kernel holds at most " << largest
      << " query heads of a KV head, or more of a single one under a variant without parameters";
  return parts;
}

// ---- StagingBuffer ----

StagingBuffer::StagingBuffer(const CudaKernel& kernel) : kernel_(kernel) {
  CheckCuda(kernel.event_create(&event_), "creating a CUDA event");
}

StagingBuffer::~StagingBuffer() {
  if (in_flight_) kernel_.event_wait(event_);
  if (data_ != nullptr) kernel_.host_free(data_);
  kernel_.event_destroy(event_);
}

void StagingBuffer::Wait() {
  if (!in_flight_) return;
  CheckCuda(kernel_.event_wait(event_), "waiting for the copy of a plan");
  in_flight_ = false;
}

char* StagingBuffer::Acquire(int64_t bytes) {
  Wait();
  if (bytes > capacity_) {
    void* memory = nullptr;
    const int64_t capacity = std::max(bytes, capacity_ * 3 / 2);
    CheckCuda(kernel_.host_alloc(&memory, capacity), "allocating page-locked memory for a plan");
    if (data_ != nullptr) kernel_.host_free(data_);
    data_ = static_cast<char*>(memory);
    capacity_ = capacity;
  }
  return data_;
}

void StagingBuffer::Send(void* device, int64_t bytes, void* stream) {
  CheckCuda(kernel_.copy(device, data_, bytes, stream), "copying a plan to the GPU");
  CheckCuda(kernel_.event_record(event_, stream), "recording the copy of a plan");
  in_flight_ = true;
}

// ---- CudaPlan ----

static PlanBounds WithWorkers(PlanBounds bounds, const CudaKernel& kernel, int32_t tile_rows,
                              DLDevice device) {
  if (bounds.num_workers > 0) return bounds;
  CurrentStream(device);
  CheckCuda(kernel.num_workers(tile_rows, &bounds.num_workers), "counting resident blocks");
  return bounds;
}

CudaPlan::CudaPlan(const CudaKernel& kernel, PlanBounds bounds, int32_t tile_rows,
                   int32_t num_qo_heads, int64_t header, DLDevice device)
    : bounds_(WithWorkers(bounds, kernel, tile_rows, device)),
      tile_rows_(tile_rows),
      header_((header + 63) / 64 * 64),
      scheduler_(bounds_),
      stagings_(kernel) {
  static std::atomic<int64_t> next_id{0};
  id_ = next_id.fetch_add(1, std::memory_order_relaxed);
  const PlanLayout& layout = scheduler_.layout();
  block_ =
      Tensor::Empty({header_ + layout.total * int64_t{sizeof(int32_t)}}, {kDLUInt, 8, 1}, device);
  const DLDataType f32{kDLFloat, 32, 1};
  const int64_t partials = std::max<int64_t>(1, layout.max_partials);
  o_partial_ = Tensor::Empty({partials, num_qo_heads, kernel.head_dim_vo}, f32, device);
  lse_partial_ = Tensor::Empty({partials, num_qo_heads}, f32, device);
  const int64_t tickets = int64_t{bounds_.max_q_tokens} * bounds_.num_kv_heads;
  const std::vector<int32_t> zeros(tickets, 0);
  tickets_ = Tensor::Empty({tickets}, {kDLInt, 32, 1}, device);
  tickets_.CopyFromBytes(zeros.data(), zeros.size() * sizeof(int32_t));
}

char* CudaPlan::Make(const ScheduleInput& in, int64_t num_pages) {
  const PlanLayout& plan = scheduler_.layout();
  // Page ids are the last section: what lies past the used ones is not sent, nor staged.
  const int64_t bytes =
      header_ + (plan.Offset(PlanSection::kKVIndices) + num_pages) * int64_t{sizeof(int32_t)};
  char* staging = stagings_.Acquire(bytes);
  scheduler_.Plan(in, reinterpret_cast<int32_t*>(staging + header_));
  stagings_.Use();
  used_bytes_ = bytes;
  return staging;
}

void CudaPlan::Send(void* stream) {
  stagings_.current().Send(DataOf(*block_.operator->()), used_bytes_, stream);
}

void CudaPlan::Describe(AttentionParams* params) const {
  const auto* block = static_cast<const char*>(DataOf(*block_.operator->()));
  params->plan = PlanView::Make(reinterpret_cast<const int32_t*>(block + header_),
                                scheduler_.layout(), bounds_);
  params->o_partial = static_cast<float*>(DataOf(*o_partial_.operator->()));
  params->lse_partial = static_cast<float*>(DataOf(*lse_partial_.operator->()));
  params->tickets = static_cast<int32_t*>(DataOf(*tickets_.operator->()));
}

}  // namespace tvm_flashinfer
