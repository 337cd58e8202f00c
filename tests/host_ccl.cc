// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Collectives between the threads of a Disco session, on the CPU: TVM has NCCL's only.
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/disco/disco_worker.h>
#include <tvm/runtime/tensor.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace {

using tvm::runtime::DiscoWorker;
using tvm::runtime::Tensor;

std::mutex mutex;
std::condition_variable changed;

size_t Bytes(const Tensor& x) { return tvm::ffi::GetDataSize(*x.operator->()); }

/*! \brief The workers of a group: each gives a tensor and reads those of the others. */
class Group {
 public:
  template <typename Read>
  void Meet(int rank, int size, const Tensor& given, const Read& read) {
    given_.resize(size);
    given_[rank] = given->data;
    Wait(size);
    read(given_);
    Wait(size);
  }

 private:
  void Wait(int size) {
    std::unique_lock<std::mutex> lock(mutex);
    const int64_t round = round_;
    if (++arrived_ == size) {
      arrived_ = 0;
      ++round_;
      changed.notify_all();
    }
    changed.wait(lock, [&] { return round_ != round; });
  }

  std::vector<const void*> given_{std::vector<const void*>(64)};
  int arrived_ = 0;
  int64_t round_ = 0;
};

template <typename Read>
void Meet(const Tensor& given, bool in_group, const Read& read) {
  static Group everybody, groups[8];
  const DiscoWorker* worker = DiscoWorker::ThreadLocal();
  const int size = in_group ? worker->num_workers / worker->num_groups : worker->num_workers;
  Group* group = in_group ? &groups[worker->worker_id / size] : &everybody;
  group->Meet(worker->worker_id % size, size, given, read);
}

void AllReduce(Tensor send, int kind, bool in_group, Tensor recv) {
  TVM_FFI_ICHECK(kind == 0 && send.dtype() == (DLDataType{kDLFloat, 32, 1}));  // sums
  Meet(send, in_group, [&](const std::vector<const void*>& given) {
    auto* out = static_cast<float*>(recv->data);
    for (int64_t i = 0; i < send.numel(); ++i) {
      out[i] = 0;
      for (const void* part : given) out[i] += static_cast<const float*>(part)[i];
    }
  });
}

void BroadcastFromWorker0(Tensor send, bool in_group, Tensor recv) {
  Meet(send, in_group, [&](const std::vector<const void*>& given) {
    std::memcpy(recv->data, given[0], Bytes(recv));
  });
}

/*! \brief What was sent and not yet received, by sender and receiver. */
std::map<std::pair<int, int>, std::deque<std::vector<char>>> mail;

void SendToWorker(Tensor buffer, int receiver) {
  const auto* data = static_cast<const char*>(buffer->data);
  std::lock_guard<std::mutex> lock(mutex);
  mail[{DiscoWorker::ThreadLocal()->worker_id, receiver}].emplace_back(data, data + Bytes(buffer));
  changed.notify_all();
}

void RecvFromWorker(Tensor buffer, int sender) {
  std::unique_lock<std::mutex> lock(mutex);
  auto& box = mail[{sender, DiscoWorker::ThreadLocal()->worker_id}];
  changed.wait(lock, [&] { return !box.empty(); });
  TVM_FFI_ICHECK_EQ(box.front().size(), Bytes(buffer));
  std::memcpy(buffer->data, box.front().data(), box.front().size());
  box.pop_front();
}

/*! \brief The worker with this one's rank in another group. */
int Neighbour(int groups_on) {
  const DiscoWorker* worker = DiscoWorker::ThreadLocal();
  return worker->worker_id + groups_on * worker->num_workers / worker->num_groups;
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("tests.use_host_ccl", [] { DiscoWorker::ThreadLocal()->ccl = "host"; })
      .def("runtime.disco.host.sync_worker", [] {})
      .def("runtime.disco.host.allreduce", AllReduce)
      .def("runtime.disco.host.broadcast_from_worker0", BroadcastFromWorker0)
      .def("runtime.disco.host.send_to_worker", SendToWorker)
      .def("runtime.disco.host.recv_from_worker", RecvFromWorker)
      .def("runtime.disco.host.send_to_next_group",
           [](Tensor buffer) { SendToWorker(buffer, Neighbour(1)); })
      .def("runtime.disco.host.recv_from_prev_group",
           [](Tensor buffer) { RecvFromWorker(buffer, Neighbour(-1)); });
}

}  // namespace
