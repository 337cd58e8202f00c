// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// RoPE that is inline by TVM's name. A cache stores rotated keys all the same, since attention
// reads a key many times and stores it once; but who looks into it sees keys as if attention
// rotated them when it reads them. Where that can't be, or keys are to be seen at other positions
// than they were stored for, a kernel does rotate them when it reads them.
#include <tvm_flashinfer/dtype.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

/*! Call fn(a value of the type in C++). */
template <typename Fn>
void WithType(ElementType type, const Fn& fn) {
  switch (type) {
    case ElementType::kFloat16:
      return fn(Float16{});
    case ElementType::kBFloat16:
      return fn(BFloat16{});
    default:
      return fn(float{});
  }
}

void ToFloats(ElementType type, const void* from, int64_t count, float* to) {
  WithType(type, [&](auto element) {
    const auto* source = static_cast<const decltype(element)*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = ToFloat(source[i]);
  });
}

void FromFloats(ElementType type, const float* from, int64_t count, void* to) {
  WithType(type, [&](auto element) {
    auto* target = static_cast<decltype(element)*>(to);
    for (int64_t i = 0; i < count; ++i) target[i] = FromFloat<decltype(element)>(from[i]);
  });
}

}  // namespace

void KVCacheObj::UseInlineRope() {
  TVM_FLASHINFER_CHECK(rotates(), ValueError)
      << "inline RoPE in a cache that doesn't rotate: it was created without RoPE";
  TVM_FLASHINFER_CHECK(dtype_ == ToDLDataType(kernel_->q_type), NotImplementedError)
      << "inline RoPE in a cache whose keys are stored in another dtype than queries have";
  TVM_FLASHINFER_CHECK(!split_rotary_.has_value() || !split_rotary_->extension_factors.has_value(),
                       ValueError)
      << "rope_mode is inline, and rope_ext_factors make the rotation depend on the step that "
         "stores "
      << "a key: debug_get_kv could not give its keys back; normal works";
  TVM_FLASHINFER_CHECK(UndoesRotation(), ValueError)
      << "rope_mode is inline, and the model's rotation is not undone by the opposite position: "
      << "debug_get_kv could not give its keys back; a kernel that rotates keys when it reads them "
      << "can (kv_cache_with_rotating_kernel)";
  inline_rope_ = true;
}

/*! Known of our own rotation; the model's is tried. */
bool KVCacheObj::UndoesRotation() {
  if (!split_rotary_.has_value()) return true;
  const int64_t heads = config_.num_kv_heads, dim = config_.head_dim_qk,
                layers = config_.num_layers();
  Sequence far;
  far.dropped = 1000;  // of a token at the start
  std::vector<float> ramp(layers * heads * dim);
  for (size_t i = 0; i < ramp.size(); ++i) ramp[i] = 0.5f + static_cast<float>(i % 7) / 8;
  std::vector<char> bytes(ramp.size() * element_bytes_);
  FromFloats(kernel_->q_type, ramp.data(), ramp.size(), bytes.data());
  Tensor keys = Tensor::Empty({layers, 1, heads, dim}, dtype_, device_);
  keys.CopyFromBytes(bytes.data(), bytes.size());
  Tensor turned = Tensor::Empty(keys.Shape(), dtype_, device_);
  TurnKeys(far, 0, keys, turned, Turn::kForth);
  TurnKeys(far, 0, turned, keys, Turn::kBack);
  keys.CopyToBytes(bytes.data(), bytes.size());
  std::vector<float> back(ramp.size());
  ToFloats(kernel_->q_type, bytes.data(), back.size(), back.data());
  for (size_t i = 0; i < ramp.size(); ++i) {
    if (!(std::abs(back[i] - ramp[i]) < 0.05f)) return false;
  }
  return true;
}

void KVCacheObj::UseRotatingKernel(int32_t rotary_dim, bool interleaved) {
  TVM_FLASHINFER_CHECK(rotates(), ValueError)
      << "a kernel that rotates keys in a cache that doesn't: it was created without RoPE";
  TVM_FLASHINFER_CHECK(device_.device_type == kDLCPU, NotImplementedError)
      << "a kernel that rotates keys when it reads them, in a cache on a GPU";
  TVM_FLASHINFER_CHECK(!split_rotary_.has_value() || !split_rotary_->extension_factors.has_value(),
                       ValueError)
      << "a kernel that rotates keys when it reads them, and rope_ext_factors, which make the "
      << "rotation depend on the step that stores a key";
  TVM_FLASHINFER_CHECK(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= config_.head_dim_qk,
                       ValueError)
      << "rotary_dim is " << rotary_dim << ", expected an even number of at most head_dim "
      << config_.head_dim_qk;
  const auto check = [](const KernelHandle& kernel) {
    const VariantParam* last =
        kernel->num_params == 0 ? nullptr : kernel->params + kernel->num_params - 1;
    TVM_FLASHINFER_CHECK(last != nullptr && std::string_view(last->name) == "rope_table" &&
                             last->type == VariantType::kFloat32 && last->num_dims == 3,
                         ValueError)
        << "argument `kernel` has a variant whose last parameter isn't `rope_table`, float32 "
        << "[positions, 2, rotary_dim]";
  };
  check(kernel_);
  for (const LayerGroup& group : groups_) check(group.kernel);
  rope_table_ = MakeRopeTable(rotary_dim, interleaved);
  runner_->RotateQueriesOnly();
  for (LayerGroup& group : groups_) group.runner->RotateQueriesOnly();
  if (kernel_->num_params == 1) UseVariant({});
}

/*! [position, 2, element]: factors of an element and of its partner. */
Tensor KVCacheObj::MakeRopeTable(int32_t rotary_dim, bool interleaved) {
  const int32_t positions = config_.max_total_seq_len, dim = config_.head_dim_qk;
  Tensor table = Tensor::Empty({positions, 2, rotary_dim}, {kDLFloat, 32, 1}, {kDLCPU, 0});
  auto* data = static_cast<float*>(table->data);
  const int32_t half = rotary_dim / 2;
  const auto is_first = [&](int32_t d) { return interleaved ? d % 2 == 0 : d < half; };
  if (rope_config_.has_value()) {
    const RopeConfig& rope = *rope_config_;
    for (int64_t position = 0; position < positions; ++position, data += 2 * rotary_dim) {
      for (int32_t d = 0; d < rotary_dim; ++d) {
        const double angle =
            static_cast<double>(position) * rope.frequencies[interleaved ? d / 2 : d % half];
        const double sine = is_first(d) ? -std::sin(angle) : std::sin(angle);
        data[d] = static_cast<float>(std::cos(angle)) * rope.magnitude;
        data[rotary_dim + d] = static_cast<float>(sine) * rope.magnitude;
      }
    }
    return table;
  }
  // Keys that are one in one half of each pair show what the model's function multiplies by.
  constexpr int32_t kAtOnce = 512;
  const int64_t row = int64_t{config_.num_kv_heads} * dim;
  std::vector<char> keys(kAtOnce * row * element_bytes_);
  std::vector<float> ones(row), shown(row);
  for (const bool first : {true, false}) {
    for (int64_t i = 0; i < row; ++i) {
      const auto d = static_cast<int32_t>(i % dim);
      ones[i] = d < rotary_dim && is_first(d) == first ? 1.0f : 0.0f;
    }
    for (int32_t i = 0; i < kAtOnce; ++i) {
      FromFloats(kernel_->q_type, ones.data(), row, keys.data() + i * row * element_bytes_);
    }
    for (int32_t begin = 0; begin < positions; begin += kAtOnce) {
      std::vector<int32_t> at(std::min(kAtOnce, positions - begin));
      std::iota(at.begin(), at.end(), begin);
      const Tensor turned = RotateByModel(at, keys.data());
      const char* from = static_cast<const char*>(DataOf(*turned.operator->()));
      for (size_t i = 0; i < at.size(); ++i) {
        ToFloats(kernel_->q_type, from + i * row * element_bytes_, dim, shown.data());
        float* to = data + int64_t{begin + static_cast<int32_t>(i)} * 2 * rotary_dim;
        for (int32_t d = 0; d < rotary_dim; ++d) {
          to[(is_first(d) == first ? 0 : rotary_dim) + d] = shown[d];
        }
      }
    }
  }
  return table;
}

Tensor KVCacheObj::RotateByModel(const std::vector<int32_t>& positions, const char* keys) {
  const int64_t heads = config_.num_kv_heads, dim = config_.head_dim_qk;
  const int64_t all = config_.num_qo_heads + 2 * heads;
  const auto count = static_cast<int64_t>(positions.size());
  const DLDevice cpu{kDLCPU, 0};
  // Its operand is a fused tensor.
  Tensor qkv = Tensor::Empty({count, all, dim}, dtype_, cpu);
  char* fused = static_cast<char*>(DataOf(*qkv.operator->()));
  std::memset(fused, 0, count * all * dim * element_bytes_);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(fused + (i * all + config_.num_qo_heads) * dim * element_bytes_,
                keys + i * heads * dim * element_bytes_, heads * dim * element_bytes_);
  }
  Tensor there = Tensor::Empty(qkv.Shape(), dtype_, device_);
  there.CopyFrom(qkv);
  Tensor where = Tensor::Empty({count}, {kDLInt, 32, 1}, device_);
  where.CopyFromBytes(positions.data(), positions.size() * sizeof(int32_t));
  const auto empty = [&](int64_t n) { return Tensor::Empty({count, n, dim}, dtype_, device_); };
  Tensor q = empty(config_.num_qo_heads), k = empty(heads), v = empty(heads);
  Rotate(there, where, q, k, v);
  Tensor result = Tensor::Empty(k.Shape(), dtype_, cpu);
  result.CopyFrom(k);
  return result;
}

void KVCacheObj::TurnKeys(const Sequence& sequence, int64_t start, const Tensor& from, Tensor to,
                          Turn turn) {
  const int64_t heads = config_.num_kv_heads, dim = config_.head_dim_qk;
  const int64_t tokens = from.Shape().Product() / (config_.num_layers() * heads * dim);
  if (tokens == 0) return;
  std::vector<int32_t> positions(tokens);
  const int32_t prefix = sequence.length - sequence.tree.size();
  for (int64_t i = 0; i < tokens; ++i) {
    const auto token = static_cast<int32_t>(start + i);
    const bool drafted = token >= prefix && !sequence.tree.empty();
    const int32_t origin =
        sequence.Origin(drafted ? prefix + sequence.tree.depths[token - prefix] : token);
    positions[i] = turn == Turn::kForth ? origin : -origin;
  }
  const DLDevice cpu{kDLCPU, 0};
  Tensor keys = Tensor::Empty(from.Shape(), dtype_, cpu);
  keys.CopyFrom(from);
  char* data = static_cast<char*>(DataOf(*keys.operator->()));
  const int64_t layer_bytes = tokens * heads * dim * element_bytes_;
  if (rope_config_.has_value()) {
    RopeConfig config = *rope_config_;
    if (turn == Turn::kBack) config.magnitude = 1.0f / config.magnitude;
    Rope rope(std::move(config), static_cast<int32_t>(tokens));
    rope.Prepare(positions.data(), static_cast<int32_t>(tokens));
    std::vector<char> source(layer_bytes);
    for (int32_t layer = 0; layer < config_.num_layers(); ++layer, data += layer_bytes) {
      std::memcpy(source.data(), data, layer_bytes);
      rope.Rotate(kernel_->q_type, {source.data(), heads * dim, dim}, {data, heads * dim, dim},
                  config_.num_kv_heads, config_.head_dim_qk);
    }
    to.CopyFrom(keys);
    return;
  }
  // The model's own function multiplies by a magnitude: the one that it gives ones at position 0.
  const auto type = kernel_->q_type;
  std::vector<float> magnitude(heads * dim, 1.0f);
  if (turn == Turn::kBack) {
    std::vector<char> ones(heads * dim * element_bytes_);
    FromFloats(type, magnitude.data(), heads * dim, ones.data());
    Tensor scaled = RotateByModel({0}, ones.data());
    ToFloats(type, DataOf(*scaled.operator->()), heads * dim, magnitude.data());
  }
  std::vector<float> row(heads * dim);
  for (int32_t layer = 0; layer < config_.num_layers(); ++layer, data += layer_bytes) {
    Tensor turned = RotateByModel(positions, data);
    char* source = static_cast<char*>(DataOf(*turned.operator->()));
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t at = i * heads * dim * element_bytes_;
      ToFloats(type, source + at, heads * dim, row.data());
      for (int64_t d = 0; d < heads * dim; ++d) row[d] /= magnitude[d] * magnitude[d];
      FromFloats(type, row.data(), heads * dim, data + at);
    }
  }
  to.CopyFrom(keys);
}

}  // namespace tvm_flashinfer
