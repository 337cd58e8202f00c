// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "cuda_step_runner.h"

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/runtime/device_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

using tvm::runtime::Tensor;

void Check(const char* error, const char* what) {
  TVM_FLASHINFER_CHECK(error == nullptr, RuntimeError) << what << ": " << error;
}

}  // namespace

// ---- StagingBuffer ----

StagingBuffer::StagingBuffer(const CudaKernel& kernel) : kernel_(kernel) {
  Check(kernel.event_create(&event_), "creating a CUDA event");
}

StagingBuffer::~StagingBuffer() {
  if (in_flight_) kernel_.event_wait(event_);
  if (data_ != nullptr) kernel_.host_free(data_);
  kernel_.event_destroy(event_);
}

char* StagingBuffer::Acquire(int64_t bytes) {
  if (in_flight_) {
    Check(kernel_.event_wait(event_), "waiting for the copy of an earlier plan");
    in_flight_ = false;
  }
  if (bytes > capacity_) {
    void* memory = nullptr;
    const int64_t capacity = std::max(bytes, capacity_ * 3 / 2);
    Check(kernel_.host_alloc(&memory, capacity), "allocating page-locked memory for a plan");
    if (data_ != nullptr) kernel_.host_free(data_);
    data_ = static_cast<char*>(memory);
    capacity_ = capacity;
  }
  return data_;
}

void StagingBuffer::Send(void* device, int64_t bytes, void* stream) {
  Check(kernel_.copy(device, data_, bytes, stream), "copying a plan to the GPU");
  Check(kernel_.event_record(event_, stream), "recording the copy of a plan");
  in_flight_ = true;
}

// ---- CudaPlan ----

CudaPlan::CudaPlan(const CudaKernel& kernel, const KVCacheConfig& config, PlanBounds bounds,
                   int32_t tile_rows, DLDevice device)
    : bounds_(bounds), tile_rows_(tile_rows), scheduler_(bounds) {
  static std::atomic<int64_t> next_id{0};
  id_ = next_id.fetch_add(1, std::memory_order_relaxed);
  for (auto& staging : stagings_) staging = std::make_unique<StagingBuffer>(kernel);
  const PlanLayout& layout = scheduler_.layout();
  const int64_t bytes = plan_offset() + layout.total * int64_t{sizeof(int32_t)};
  block_ = Tensor::Empty({bytes}, {kDLUInt, 8, 1}, device);
  positions_ = block_.CreateView({bounds.max_q_tokens}, {kDLInt, 32, 1});
  const DLDataType f32{kDLFloat, 32, 1};
  const int64_t partials = std::max<int64_t>(1, layout.max_partials);
  o_partial_ = Tensor::Empty({partials, config.num_qo_heads, config.head_dim_vo}, f32, device);
  lse_partial_ = Tensor::Empty({partials, config.num_qo_heads}, f32, device);
  const int64_t tickets = kQueueTickets + int64_t{bounds.max_q_tokens} * config.num_kv_heads;
  const std::vector<int32_t> zeros(tickets, 0);
  tickets_ = Tensor::Empty({tickets}, {kDLInt, 32, 1}, device);
  tickets_.CopyFromBytes(zeros.data(), zeros.size() * sizeof(int32_t));
}

void CudaPlan::Make(const ScheduleInput& in, const StepLayout& layout) {
  const int next = (current_ + 1) % kStagings;
  const PlanLayout& plan = scheduler_.layout();
  // Page ids are the last section: what lies past the used ones is not sent, nor staged.
  const int64_t bytes =
      plan_offset() +
      (plan.Offset(PlanSection::kKVIndices) + layout.num_blocks()) * int64_t{sizeof(int32_t)};
  char* staging = stagings_[next]->Acquire(bytes);
  auto* buffer = reinterpret_cast<int32_t*>(staging + plan_offset());
  scheduler_.Plan(in, buffer);
  std::copy(layout.positions().begin(), layout.positions().end(),
            reinterpret_cast<int32_t*>(staging));
  std::copy(layout.slots().begin(), layout.slots().end(),
            reinterpret_cast<int64_t*>(staging + slots_offset()));
  current_ = next;
  const int64_t listed = reinterpret_cast<const PlanHeader*>(buffer)->num_kv_pages;
  used_bytes_ = bytes - (layout.num_blocks() - listed) * int64_t{sizeof(int32_t)};
}

void CudaPlan::Send(void* stream) {
  stagings_[current_]->Send(DataOf(*block_.operator->()), used_bytes_, stream);
}

PlanOnHost CudaPlan::OnHost() const {
  return {reinterpret_cast<const int32_t*>(stagings_[current_]->data() + plan_offset()),
          &scheduler_.layout()};
}

const int64_t* CudaPlan::slots() const {
  const auto* block = static_cast<const char*>(DataOf(*block_.operator->()));
  return reinterpret_cast<const int64_t*>(block + slots_offset());
}

void CudaPlan::Describe(AttentionParams* params) const {
  const auto* block = static_cast<const char*>(DataOf(*block_.operator->()));
  params->plan = PlanView::Make(reinterpret_cast<const int32_t*>(block + plan_offset()),
                                scheduler_.layout(), bounds_);
  params->o_partial = static_cast<float*>(DataOf(*o_partial_.operator->()));
  params->lse_partial = static_cast<float*>(DataOf(*lse_partial_.operator->()));
  params->tickets = static_cast<int32_t*>(DataOf(*tickets_.operator->()));
}

// ---- CudaStepRunner ----

CudaStepRunner::CudaStepRunner(const KVCacheConfig& config, KernelHandle kernel, DLDevice device,
                               std::optional<RopeConfig> rope)
    : StepRunner(config, std::move(kernel)), device_(device), rope_(std::move(rope)) {
  const int32_t largest = cuda().tiles[cuda().num_tiles - 1];
  TVM_FLASHINFER_CHECK(group() <= largest, ValueError)
      << "num_qo_heads / num_kv_heads is " << group() << ", the kernel holds at most " << largest
      << " query heads of a KV head";
  if (rope_.has_value()) {
    const std::vector<float>& f = rope_->frequencies;
    frequencies_ = Tensor::Empty({static_cast<int64_t>(f.size())}, {kDLFloat, 32, 1}, device);
    frequencies_.CopyFromBytes(f.data(), f.size() * sizeof(float));
    rotated_q_ = Tensor::Empty({config.max_q_tokens(), config.num_qo_heads, config.head_dim_qk},
                               ToDLDataType(kernel_->q_type), device);
  }
}

void* CudaStepRunner::Stream() const {
  if (device_.device_type != kDLCUDA) return nullptr;
  tvm::runtime::DeviceAPI::Get(device_)->SetDevice(device_);
  return TVMFFIEnvGetStream(device_.device_type, device_.device_id);
}

/*! A tile is taken by steps of few enough tokens a request, so all but the last are small. */
PlanBounds CudaStepRunner::TileBounds(PlanBounds bounds, int32_t tile_rows, bool last) const {
  bounds.max_tile_tokens = std::max(1, tile_rows / group());
  if (!last) {
    bounds.max_q_tokens = static_cast<int32_t>(std::min<int64_t>(
        bounds.max_q_tokens, int64_t{config_.max_batch} * bounds.max_tile_tokens));
    bounds.max_prefix_q_tokens = std::min(bounds.max_prefix_q_tokens, bounds.max_q_tokens);
  }
  bounds.max_splits = 8;
  Stream();
  Check(cuda().num_workers(tile_rows, &bounds.num_workers), "counting resident blocks");
  return bounds;
}

CudaPlan* CudaStepRunner::PlanOf(int tile, const StepLayout& layout) {
  const bool by_token = layout.by_token();
  std::unique_ptr<CudaPlan>& plan = (by_token ? token_plans_ : page_plans_)[tile];
  const int64_t blocks = layout.num_blocks();
  if (plan == nullptr || (by_token && plan->bounds().max_kv_pages < blocks)) {
    const PlanBounds bounds = by_token ? TokenBounds(blocks) : PageBounds();
    const bool last = tile + 1 == cuda().num_tiles;
    auto made = std::make_unique<CudaPlan>(
        cuda(), config_, TileBounds(bounds, cuda().tiles[tile], last), cuda().tiles[tile], device_);
    if (plan_ == plan.get()) plan_ = nullptr;
    plan = std::move(made);
  }
  return plan.get();
}

void CudaStepRunner::Plan(StepLayout* layout) {
  ScheduleInput in = Describe(layout);
  const int64_t requests = std::max(1, in.num_requests);
  const int64_t mean = (layout->num_tokens() + requests - 1) / requests;
  int tile = cuda().num_tiles - 1;
  while (tile > 0 && cuda().tiles[tile - 1] >= std::max<int64_t>(1, mean) * group()) --tile;
  in.min_chunk = 64;
  tile = Compose(tile, &in);
  CudaPlan* plan = PlanOf(tile, *layout);
  plan->Make(in, *layout);
  next_ = plan;
}

ReadCosts CudaStepRunner::PrefixCosts(int tile) const {
  ReadCosts costs;
  costs.memory = kMemoryRows;
  costs.cached = kMemoryRows / 2;  // from L2
  costs.panel_rows = costs.panel_cost = cuda().tiles[tile];
  return costs;
}

/*! One tile serves the whole launch: a larger one reads a prefix for more queries at a time. */
int CudaStepRunner::Compose(int tile, ScheduleInput* in) {
  const ScheduleInput flat = *in;
  int64_t best_gain = 0;
  int best = tile;
  for (int t = tile; t < cuda().num_tiles; ++t) {
    *in = flat;
    format_.Use(PrefixCosts(t));
    if (format_.Compose(in, TileTokens(t)) > 0 && format_.gain() > best_gain) {
      best_gain = format_.gain();
      best = t;
    }
  }
  *in = flat;
  in->tile_tokens = TileTokens(best);
  if (best_gain > 0) {
    in->compute_rows = kMemoryRows;
    format_.Use(PrefixCosts(best));
    format_.Compose(in, TileTokens(best));
  }
  return best;
}

void CudaStepRunner::Begin(const StepLayout& layout) {
  plan_ = next_;
  num_tokens_ = layout.num_tokens();
  plan_->Send(Stream());
}

void CudaStepRunner::Append(const PoolView& pool, TokenHeads* q, TokenHeads k, TokenHeads v) {
  CudaAppendParams params{};
  params.q = q->data;
  params.q_token_stride = q->token_stride;
  params.q_head_stride = q->head_stride;
  params.k = k.data;
  params.k_token_stride = k.token_stride;
  params.k_head_stride = k.head_stride;
  params.v = v.data;
  params.v_token_stride = v.token_stride;
  params.v_head_stride = v.head_stride;
  params.k_pool = pool.k;
  params.v_pool = pool.v;
  params.k_strides = pool.k_strides;
  params.v_strides = pool.v_strides;
  params.slots = plan_->slots();
  params.positions = static_cast<const int32_t*>(DataOf(*plan_->positions().operator->()));
  params.num_qo_heads = config_.num_qo_heads;
  params.num_kv_heads = config_.num_kv_heads;
  params.page_size = config_.page_size;
  if (rope_.has_value()) {
    params.rotated_q = DataOf(*rotated_q_.operator->());
    params.frequencies = static_cast<const float*>(DataOf(*frequencies_.operator->()));
    params.magnitude = rope_->magnitude;
    params.rotary_dim = rope_->rotary_dim();
    params.interleaved = rope_->interleaved ? 1 : 0;
    const int64_t dim = config_.head_dim_qk;
    *q = {params.rotated_q, config_.num_qo_heads * dim, dim};
  }
  Check(cuda().append(&params, num_tokens_, Stream()), "appending keys and values");
}

void CudaStepRunner::Attend(AttentionParams* params) {
  plan_->Describe(params);
  Check(cuda().run(params, plan_->tile_rows(), plan_->bounds().num_workers, Stream()), "attention");
}

void CudaStepRunner::Copy(void* to, const void* from, int64_t bytes) {
  Check(cuda().copy(to, from, bytes, Stream()), "copying keys and values");
}

void CudaStepRunner::Wait() {
  void* event = nullptr;
  Check(cuda().event_create(&event), "creating a CUDA event");
  const char* error = cuda().event_record(event, Stream());
  if (error == nullptr) error = cuda().event_wait(event);
  cuda().event_destroy(event);
  Check(error, "waiting for the GPU");
}

}  // namespace tvm_flashinfer
