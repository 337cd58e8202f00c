// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Attention inside a stateless graph: every request has as many queries and keys as any other, and
// operands are read and written where the graph has them, by strides.
#ifndef TVM_FLASHINFER_RUNTIME_GRAPH_PLAN_H_
#define TVM_FLASHINFER_RUNTIME_GRAPH_PLAN_H_

#include <tvm/ffi/function.h>
#include <tvm_flashinfer/params.h>
#include <tvm_flashinfer/schedule.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "kernel_handle.h"
#include "variant_args.h"

namespace tvm_flashinfer {

/*! \brief Extents of one attention; what a plan depends on, less the kernel. */
struct GraphExtents {
  int64_t batch, num_queries, num_keys, q_begin, num_qo_heads, num_kv_heads;
  bool operator==(const GraphExtents& o) const {
    return batch == o.batch && num_queries == o.num_queries && num_keys == o.num_keys &&
           q_begin == o.q_begin && num_qo_heads == o.num_qo_heads && num_kv_heads == o.num_kv_heads;
  }
};

/*! \brief Element (b, h, t, d) of an operand lies at b * batch + h * head + t * token + d. */
struct GraphOperand {
  char* data;
  int64_t batch, head, token;  //!< in elements
};

/*! \brief A batch of such requests, as the scheduler is told of it. */
class GraphBatch {
 public:
  GraphBatch(const GraphExtents& extents, const KernelHandle& kernel);
  GraphBatch(const GraphBatch&) = delete;
  GraphBatch& operator=(const GraphBatch&) = delete;

  /*! \brief All but the tile and the queues, which a backend chooses; it points into this. */
  const ScheduleInput& input() const { return input_; }

 private:
  std::vector<int32_t> qo_indptr_, kv_indptr_, pages_, kv_len_, kv_position_, q_position_;
  LayoutLevel level_;
  ScheduleInput input_;
};

/*! \brief A plan of a shape, made once, and the memory that its runs need. */
class GraphPlan {
 public:
  virtual ~GraphPlan() = default;
  /*! \brief The plan on a kernel's backend. */
  static std::unique_ptr<GraphPlan> Make(const tvm::ffi::Function& factory,
                                         const GraphExtents& extents, DLDevice device);

  const KernelTraits& kernel() const { return *kernel_; }
  DLDevice device() const { return device_; }
  BoundVariantArgs& variant_args() { return variant_args_; }
  bool Serves(const void* table, const GraphExtents& extents, DLDevice device) const {
    return table == static_cast<const void*>(&*kernel_) && extents == extents_ &&
           device.device_type == device_.device_type && device.device_id == device_.device_id;
  }
  /*! \brief Whether a CUDA graph runs it: then it stays. */
  bool captured() const { return captured_; }

  void Run(const GraphOperand& q, const GraphOperand& k, const GraphOperand& v,
           const GraphOperand& o, double sm_scale);

 protected:
  GraphPlan(KernelHandle kernel, const GraphExtents& extents, DLDevice device)
      : kernel_(std::move(kernel)), extents_(extents), device_(device) {}

  /*! \brief Run `params`, which lacks q, o and what the plan and the workspace decide. */
  virtual void Launch(AttentionParams* params, const GraphOperand& q, const GraphOperand& o) = 0;

  int32_t group() const {
    return static_cast<int32_t>(extents_.num_qo_heads / extents_.num_kv_heads);
  }
  /*! \brief What the extents bound; tiles and workers are a backend's. */
  static PlanBounds Bounds(const GraphExtents& extents);
  /*! \throws ValueError if a plan within these bounds can't be indexed. */
  static void CheckBounds(const PlanBounds& bounds, const GraphExtents& extents);

  KernelHandle kernel_;
  GraphExtents extents_;
  DLDevice device_;
  bool captured_ = false;

 private:
  /*! What a run visits. */
  VisitedRange Visited() const;

  BoundVariantArgs variant_args_;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_GRAPH_PLAN_H_
