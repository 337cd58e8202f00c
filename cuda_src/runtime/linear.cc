// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// tvm_flashinfer.linear(x, weight, [bias,] out): out = x weight^T + bias on the CPU.
//
//   x       [..., K]  any number of leading dimensions, M rows in all
//   weight  [N, K]    (tvm_flashinfer.linear_kn: [K, N])
//   bias    [N]       may be absent
//   out     [..., N]
//
// Each of them is float32, float16 or bfloat16 on its own account; sums are float32. Up to
// kStreamRows rows the weight is streamed through the cache once (linear_stream.h), more rows go to
// BLAS in blocks, 16-bit operands widened block by block. Threads are TVM's own.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/c_backend_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "linear_blas.h"
#include "linear_stream.h"

namespace tvm_flashinfer {
namespace linear {
namespace {

using tvm::ffi::TensorView;

// Where BLAS overtakes the streaming kernel: near 64 rows on Zen 3 for float32 and float16. The
// lower bound keeps x in the second-level cache at K = 4096.
constexpr int64_t kStreamRows = 32;

/*! \brief One checked call, as matrices. */
struct Linear {
  const void* x;
  const void* weight;
  const void* bias;  // null if absent
  void* out;
  int64_t m, n, k;
  Storage x_storage, weight_storage, bias_storage, out_storage;
  WeightLayout layout;

  int64_t weight_ld() const { return layout == WeightLayout::kNK ? k : n; }
};

size_t BytesOf(Storage storage) { return storage == Storage::kFloat32 ? 4 : 2; }

const void* At(const void* base, Storage storage, int64_t element) {
  return static_cast<const char*>(base) + element * static_cast<int64_t>(BytesOf(storage));
}
void* At(void* base, Storage storage, int64_t element) {
  return static_cast<char*>(base) + element * static_cast<int64_t>(BytesOf(storage));
}

/*! \brief The kernels that this CPU can run, best first. */
std::vector<Kernels> AvailableKernels() {
  std::vector<Kernels> available;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    available.push_back(Avx512Kernels());
  }
  if (avx2) available.push_back(Avx2Kernels());
#endif
  available.push_back(BaselineKernels());
  return available;
}

Kernels& ThisCpu() {
  static Kernels kernels = AvailableKernels().front();
  return kernels;
}

/*! \brief Names of the instruction sets this CPU can run, best first; the first is the default. */
tvm::ffi::Array<tvm::ffi::String> InstructionSets() {
  tvm::ffi::Array<tvm::ffi::String> names;
  for (const Kernels& kernels : AvailableKernels()) names.push_back(kernels.name);
  return names;
}

/*! \brief Take another of them, to test or to measure it; not while a call runs. */
void SetInstructionSet(const tvm::ffi::String& name) {
  std::string accepted;
  for (const Kernels& kernels : AvailableKernels()) {
    if (name == kernels.name) {
      ThisCpu() = kernels;
      return;
    }
    accepted += (accepted.empty() ? "" : ", ") + std::string(kernels.name);
  }
  TVM_FFI_THROW(ValueError) << "tvm_flashinfer.linear_set_instruction_set: name is '" << name
                            << "', but this CPU accepts one of " << accepted;
}

/*!
 * \brief Scratch memory of the calling thread, kept between calls: workers live long.
 *
 * Aligned to the widest vector; one that straddles two cache lines costs two loads.
 */
float* Scratch(int slot, int64_t count) {
  constexpr std::align_val_t kAlignment{64};
  struct Buffer {
    float* data = nullptr;
    int64_t capacity = 0;
    void Resize(int64_t count) {
      ::operator delete(data, kAlignment);  // first, so that both never exist at once
      data = nullptr;
      capacity = 0;
      data = static_cast<float*>(::operator new(count * sizeof(float), kAlignment));
      capacity = count;
    }
    ~Buffer() { ::operator delete(data, kAlignment); }
  };
  static thread_local Buffer buffers[4];
  Buffer& buffer = buffers[slot];
  if (buffer.capacity < count) buffer.Resize(count);
  return buffer.data;
}
enum ScratchSlot { kRowsSlot, kBiasSlot, kWeightSlot, kOutSlot };

int NumThreads() {
  static const tvm::ffi::Function num_threads =
      tvm::ffi::Function::GetGlobalRequired("runtime.NumThreads");
  return num_threads().cast<int>();
}

/*! \brief task(0) .. task(count - 1) on TVM's workers, which take them as they come free. */
template <typename Task>
void ParallelFor(int64_t count, const Task& task) {
  if (count <= 1 || NumThreads() == 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Work {
    const Task* task;
    int64_t count;
    std::atomic<int64_t> next{0};
  } work{&task, count};
  const auto worker = [](int, TVMParallelGroupEnv*, void* data) -> int {
    TVM_FFI_SAFE_CALL_BEGIN();
    Work* work = static_cast<Work*>(data);
    for (int64_t i = work->next++; i < work->count; i = work->next++) (*work->task)(i);
    TVM_FFI_SAFE_CALL_END();
  };
  if (TVMBackendParallelLaunch(worker, &work, 0) != 0) {
    throw tvm::ffi::details::MoveFromSafeCallRaised();
  }
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

void AddBias(const float* bias, int64_t rows, int64_t columns, float* y, int64_t y_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) y[i * y_stride + j] += bias[j];
  }
}

/*! \brief A block of results to its place in out. */
void Finish(const Linear& call, const float* bias, int64_t row, int64_t rows, int64_t column,
            int64_t columns, float* y, int64_t y_stride) {
  if (bias != nullptr) AddBias(bias + column, rows, columns, y, y_stride);
  if (call.out_storage == Storage::kFloat32) return;  // y is out itself
  for (int64_t i = 0; i < rows; ++i) {
    ThisCpu().narrow(y + i * y_stride, At(call.out, call.out_storage, (row + i) * call.n + column),
                     call.out_storage, columns);
  }
}

const float* WidenedBias(const Linear& call) {
  if (call.bias == nullptr) return nullptr;
  if (call.bias_storage == Storage::kFloat32) return static_cast<const float*>(call.bias);
  float* bias = Scratch(kBiasSlot, call.n);
  ThisCpu().widen(call.bias, call.bias_storage, bias, call.n);
  return bias;
}

void RunStreaming(const Linear& call) {
  const float* bias = WidenedBias(call);
  const float* x = static_cast<const float*>(call.x);
  int64_t x_stride = call.k;
  if (call.x_storage != Storage::kFloat32 || call.k % kPadding != 0) {
    x_stride = RoundUp(call.k, kPadding);
    float* widened = Scratch(kRowsSlot, call.m * x_stride);
    for (int64_t i = 0; i < call.m; ++i) {
      float* row = widened + i * x_stride;
      ThisCpu().widen(At(call.x, call.x_storage, i * call.k), call.x_storage, row, call.k);
      std::fill(row + call.k, row + x_stride, 0.0f);
    }
    x = widened;
  }
  // A task reads some 128 KiB (6 us from memory), less if that leaves workers idle. Its columns are
  // a multiple of the widest vector and of three and four lines, which the kernel takes at a time.
  constexpr int64_t kTaskBytes = 128 << 10, kUnit = 48;
  const int64_t feature_bytes = std::max<int64_t>(1, call.k * BytesOf(call.weight_storage));
  const int threads = NumThreads();
  int64_t features = threads == 1 ? call.n
                                  : std::min(kTaskBytes / feature_bytes,
                                             CeilDiv(call.n, static_cast<int64_t>(threads) * 4));
  features = std::max(RoundUp(features, kUnit), kUnit);
  ParallelFor(CeilDiv(call.n, features), [&](int64_t task) {
    const int64_t begin = task * features;
    const int64_t count = std::min(features, call.n - begin);
    const bool by_lines = call.layout == WeightLayout::kNK;
    StreamArgs args;
    args.x = x;
    args.x_stride = x_stride;
    args.weight = At(call.weight, call.weight_storage, by_lines ? begin * call.k : begin);
    args.weight_ld = call.weight_ld();
    const bool direct = call.out_storage == Storage::kFloat32;
    args.y = direct ? static_cast<float*>(call.out) + begin : Scratch(kOutSlot, call.m * count);
    args.y_stride = direct ? call.n : count;
    args.m = call.m;
    args.n = count;
    args.k = call.k;
    args.storage = call.weight_storage;
    args.layout = call.layout;
    ThisCpu().stream(args);
    Finish(call, bias, 0, call.m, begin, count, args.y, args.y_stride);
  });
}

/*! \brief Rows of a matrix as float32: themselves, or a widened copy of [rows, columns]. */
struct Panel {
  const float* data;
  int64_t ld;
};
Panel Widen(const void* matrix, Storage storage, int64_t ld, int64_t row, int64_t rows,
            int64_t column, int64_t columns, ScratchSlot slot) {
  const void* first = At(matrix, storage, row * ld + column);
  if (storage == Storage::kFloat32) return {static_cast<const float*>(first), ld};
  float* widened = Scratch(slot, rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    ThisCpu().widen(At(first, storage, i * ld), storage, widened + i * columns, columns);
  }
  return {widened, columns};
}

void RunBlas(const Linear& call) {
  const Blas& blas =
      Blas::Get();  // here: a missing library must be an error of the caller's thread
  const float* bias = WidenedBias(call);
  const bool wide = call.x_storage == Storage::kFloat32 && call.weight_storage == Storage::kFloat32;
  // BLAS packs both operands at each call, which blocks of this size repay. Widened panels of
  // 16-bit operands (512 x 512 of x, 256 x 512 of the weight) stay in the cache until they are
  // packed.
  const int threads = NumThreads();
  int64_t rows = call.m, columns = call.n, depth = call.k;
  if (!wide || threads > 1) {
    rows = CeilDiv(call.m, CeilDiv(call.m, 512));
    const int64_t wanted = CeilDiv(int64_t{3} * threads, CeilDiv(call.m, rows));
    columns = std::min<int64_t>(RoundUp(CeilDiv(call.n, wanted), 16), wide ? 1024 : 256);
    columns = std::max<int64_t>(columns, 128);
  }
  if (!wide) depth = 512;
  const int64_t row_blocks = CeilDiv(call.m, rows);
  ParallelFor(row_blocks * CeilDiv(call.n, columns), [&](int64_t task) {
    const int64_t row = task % row_blocks * rows;
    const int64_t column = task / row_blocks * columns;
    const int64_t m = std::min(rows, call.m - row), n = std::min(columns, call.n - column);
    const bool direct = call.out_storage == Storage::kFloat32;
    float* y =
        direct ? static_cast<float*>(call.out) + row * call.n + column : Scratch(kOutSlot, m * n);
    const int64_t y_stride = direct ? call.n : n;
    const bool by_lines = call.layout == WeightLayout::kNK;
    for (int64_t begin = 0; begin < call.k; begin += depth) {
      const int64_t k = std::min(depth, call.k - begin);
      const Panel x = Widen(call.x, call.x_storage, call.k, row, m, begin, k, kRowsSlot);
      const Panel weight =
          by_lines
              ? Widen(call.weight, call.weight_storage, call.k, column, n, begin, k, kWeightSlot)
              : Widen(call.weight, call.weight_storage, call.n, begin, k, column, n, kWeightSlot);
      blas.Sgemm(by_lines, m, n, k, x.data, x.ld, weight.data, weight.ld, begin > 0, y, y_stride);
    }
    Finish(call, bias, row, m, column, n, y, y_stride);
  });
}

// ---- The boundary: what was given, what is accepted, which argument ----

std::string Describe(const TensorView& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.ndim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

class Arguments {
 public:
  Arguments(const char* function, tvm::ffi::PackedArgs args) : function_(function), args_(args) {}

  TensorView Tensor(int index, const char* name) const {
    const std::optional<TensorView> tensor = args_[index].try_cast<TensorView>();
    if (!tensor.has_value()) {
      TVM_FFI_THROW(TypeError) << function_ << ": " << name << " is " << args_[index].GetTypeKey()
                               << ", but must be a tensor";
    }
    if (tensor->device().device_type != kDLCPU) {
      TVM_FFI_THROW(ValueError) << function_ << ": " << name << " is on device type "
                                << static_cast<int>(tensor->device().device_type)
                                << ", but must be in CPU memory (device type 1)";
    }
    if (!tensor->IsContiguous()) {
      TVM_FFI_THROW(ValueError) << function_ << ": " << name << " of shape " << Describe(*tensor)
                                << " is not contiguous, but must be (row-major, no gaps)";
    }
    return *tensor;
  }

  Storage StorageOf(const TensorView& tensor, const char* name) const {
    const DLDataType dtype = tensor.dtype();
    if (dtype.lanes == 1) {
      if (dtype.code == kDLFloat && dtype.bits == 32) return Storage::kFloat32;
      if (dtype.code == kDLFloat && dtype.bits == 16) return Storage::kFloat16;
      if (dtype.code == kDLBfloat && dtype.bits == 16) return Storage::kBFloat16;
    }
    TVM_FFI_THROW(TypeError) << function_ << ": " << name << " is "
                             << tvm::ffi::DLDataTypeToString(dtype)
                             << ", but must be float32, float16 or bfloat16";
    TVM_FFI_UNREACHABLE();
  }

  void Expect(bool holds, const char* name, const TensorView& tensor,
              const std::string& accepted) const {
    if (holds) return;
    TVM_FFI_THROW(ValueError) << function_ << ": " << name << " has shape " << Describe(tensor)
                              << ", but must be " << accepted;
  }

 private:
  const char* function_;
  tvm::ffi::PackedArgs args_;
};

void* Data(const TensorView& tensor) {
  return static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset();
}

Linear Check(const char* function, WeightLayout layout, tvm::ffi::PackedArgs packed) {
  const int count = packed.size();
  if (count != 3 && count != 4) {
    TVM_FFI_THROW(TypeError) << function << " was given " << count
                             << " arguments, but takes x, weight, [bias,] out";
  }
  const Arguments args(function, packed);
  const TensorView x = args.Tensor(0, "x");
  const TensorView weight = args.Tensor(1, "weight");
  const TensorView out = args.Tensor(count - 1, "out");
  const bool by_lines = layout == WeightLayout::kNK;

  args.Expect(x.ndim() >= 1, "x", x, "[..., K]");
  args.Expect(weight.ndim() == 2, "weight", weight, by_lines ? "[N, K]" : "[K, N]");
  Linear call;
  call.layout = layout;
  call.k = x.size(-1);
  call.n = weight.size(by_lines ? 0 : 1);
  const std::string k = std::to_string(call.k), n = std::to_string(call.n);
  args.Expect(weight.size(by_lines ? 1 : 0) == call.k, "weight", weight,
              (by_lines ? "[N, " + k + "]" : "[" + k + ", N]") + ", as x has " + k + " columns");
  bool same_rows = out.ndim() == x.ndim() && out.size(-1) == call.n;
  call.m = 1;
  std::string accepted = "[";
  for (int i = 0; i + 1 < x.ndim(); ++i) {
    same_rows = same_rows && out.size(i) == x.size(i);
    call.m *= x.size(i);
    accepted += std::to_string(x.size(i)) + ", ";
  }
  args.Expect(same_rows, "out", out, accepted + n + "]: the rows of x by N");
  call.x = Data(x);
  call.weight = Data(weight);
  call.out = Data(out);
  call.bias = nullptr;
  call.x_storage = args.StorageOf(x, "x");
  call.weight_storage = args.StorageOf(weight, "weight");
  call.bias_storage = Storage::kFloat32;
  call.out_storage = args.StorageOf(out, "out");
  if (count == 4) {
    const TensorView bias = args.Tensor(2, "bias");
    args.Expect(bias.ndim() == 1 && bias.size(0) == call.n, "bias", bias, "[" + n + "]");
    call.bias = Data(bias);
    call.bias_storage = args.StorageOf(bias, "bias");
  }
  return call;
}

template <WeightLayout layout>
void Run(tvm::ffi::PackedArgs args, tvm::ffi::Any*) {
  const Linear call =
      Check(layout == WeightLayout::kNK ? "tvm_flashinfer.linear" : "tvm_flashinfer.linear_kn",
            layout, args);
  if (call.m == 0 || call.n == 0) return;
  // Without a sum there is nothing for BLAS to do, and the streaming kernel writes the zeros.
  if (call.m <= kStreamRows || call.k == 0) {
    RunStreaming(call);
  } else {
    RunBlas(call);
  }
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def_packed("tvm_flashinfer.linear", Run<WeightLayout::kNK>)
      .def_packed("tvm_flashinfer.linear_kn", Run<WeightLayout::kKN>)
      .def("tvm_flashinfer.linear_instruction_sets", InstructionSets)
      .def("tvm_flashinfer.linear_set_instruction_set", SetInstructionSet);
}

}  // namespace
}  // namespace linear
}  // namespace tvm_flashinfer
