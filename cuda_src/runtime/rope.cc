// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "rope.h"

#include <tvm/runtime/c_backend_api.h>
#include <tvm_flashinfer/dtype.h>

#include <cmath>
#include <cstring>
#include <utility>

namespace tvm_flashinfer {
namespace {

/*! Call fn(token) for each token, on all threads of TVM's pool where that pays. */
template <typename Fn>
void ForEachToken(int32_t count, const Fn& fn) {
  constexpr int32_t kWorthThreads = 32;
  if (count < kWorthThreads) {
    for (int32_t token = 0; token < count; ++token) fn(token);
    return;
  }
  struct Shared {
    const Fn* fn;
    int64_t count;
  } shared{&fn, count};
  const auto body = [](int task, TVMParallelGroupEnv* env, void* data) {
    const auto* s = static_cast<const Shared*>(data);
    const int64_t begin = s->count * task / env->num_task;
    const int64_t end = s->count * (task + 1) / env->num_task;
    for (int64_t token = begin; token < end; ++token) (*s->fn)(static_cast<int32_t>(token));
    return 0;
  };
  TVMBackendParallelLaunch(body, &shared, 0);
}

template <typename T>
void RotateHead(const RopeConfig& config, const float* cos, const float* sin, const T* from, T* to,
                int32_t dim) {
  const int32_t pairs = config.rotary_dim() / 2;
  const int32_t step = config.interleaved ? 2 : 1;
  const int32_t apart = config.interleaved ? 1 : pairs;
  for (int32_t i = 0; i < pairs; ++i) {
    const float a = ToFloat(from[i * step]);
    const float b = ToFloat(from[i * step + apart]);
    to[i * step] = FromFloat<T>(a * cos[i] - b * sin[i]);
    to[i * step + apart] = FromFloat<T>(b * cos[i] + a * sin[i]);
  }
  std::memcpy(to + 2 * pairs, from + 2 * pairs, (dim - 2 * pairs) * sizeof(T));
}

}  // namespace

Rope::Rope(RopeConfig config, int32_t max_tokens)
    : config_(std::move(config)),
      cos_(static_cast<size_t>(max_tokens) * config_.frequencies.size()),
      sin_(cos_.size()) {}

void Rope::Prepare(const int32_t* positions, int32_t count) {
  count_ = count;
  const size_t pairs = config_.frequencies.size();
  ForEachToken(count, [&](int32_t token) {
    // Double: positions of an endless stream grow, and the differences of angles must not blur.
    const double position = positions[token];
    for (size_t i = 0; i < pairs; ++i) {
      const double angle = position * config_.frequencies[i];
      cos_[token * pairs + i] = static_cast<float>(std::cos(angle)) * config_.magnitude;
      sin_[token * pairs + i] = static_cast<float>(std::sin(angle)) * config_.magnitude;
    }
  });
}

void Rope::Rotate(ElementType type, TokenHeads from, TokenHeads to, int32_t heads,
                  int32_t dim) const {
  const size_t pairs = config_.frequencies.size();
  const auto rotate = [&](auto element) {
    using T = decltype(element);
    ForEachToken(count_, [&](int32_t token) {
      const T* source = static_cast<const T*>(from.data) + token * from.token_stride;
      T* target = static_cast<T*>(to.data) + token * to.token_stride;
      for (int32_t head = 0; head < heads; ++head) {
        RotateHead(config_, cos_.data() + token * pairs, sin_.data() + token * pairs,
                   source + head * from.head_stride, target + head * to.head_stride, dim);
      }
    });
  };
  switch (type) {
    case ElementType::kFloat32:
      return rotate(float{});
    case ElementType::kFloat16:
      return rotate(Float16{});
    case ElementType::kBFloat16:
      return rotate(BFloat16{});
    default:  // of pools only: queries and new keys are none of those
      return;
  }
}

}  // namespace tvm_flashinfer
