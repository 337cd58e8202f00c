"""CaptureSteps: the whole of a decoding step as one CUDA graph.

Two passes around TVM's own ``RewriteCUDAGraph``, which moves what depends on fixed addresses only
into functions that the virtual machine captures at their first call and replays afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

COPY = "tvm_flashinfer.graph_copy"
KEY = "tvm_flashinfer.graph_key"
RUN_OR_CAPTURE = "vm.builtin.cuda_graph.run_or_capture"
#: Functions whose plans are static: one token for each sequence.
STEPS = ("decode", "batch_decode")
#: Functions of any number of tokens, which callers pad to a few; their twins that are captured are
#: called ``NAME_padded``.
PADDED_STEPS = ("batch_prefill",)


@tvm.transform.module_pass(opt_level=0, name="PrepareCapture")
class PrepareCapture:
    """Give a step fixed buffers for its inputs and its result.

    Before::

        def batch_decode(input_ids: Tensor[(b, 1)], kv_cache, params):   # num_input = 2
            ... logits = ...
            return logits

    After::

        def batch_decode(input_ids, kv_cache, params):                   # num_input = 1
            ids = R.call_dps_packed("tvm_flashinfer.graph_copy", (input_ids,), ...)
            ... logits = ...
            return R.call_dps_packed("tvm_flashinfer.graph_copy", (logits,), ...)

    Memory planning then gives ``ids`` and ``logits`` addresses of their own, and everything between
    the copies depends on nothing else.  Runs before LegalizeOps.

    Parameters
    ----------
    names : sequence of str
        The functions; what comes before the last of their ``num_input`` parameters is their input,
        the others (cache, params) stay the same from call to call, or the graph's key changes
        (KeyGraphs).
    padded : sequence of str
        Functions to be copied as ``NAME_padded`` and the copies to be captured, one graph for each
        number of tokens: a step may have fewer, and whatever for those that it lacks (its KV cache
        goes by what begin_forward was told).
    """

    def __init__(self, names: Sequence[str] = STEPS, padded: Sequence[str] = PADDED_STEPS) -> None:
        self.names, self.padded = tuple(names), tuple(padded)

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        updated = {}
        for gvar, func in mod.functions_items():
            if not isinstance(func, relax.Function):
                continue
            if gvar.name_hint in self.names:
                updated[gvar] = _Buffers(mod).rewrite(func)
            if gvar.name_hint in self.padded:
                name = f"{gvar.name_hint}_padded"
                copy = relax.utils.copy_with_new_vars(func).with_attr("global_symbol", name)
                updated[relax.GlobalVar(name)] = _Buffers(mod).rewrite(copy)
        if updated:
            mod = mod.clone()
            for gvar, func in updated.items():
                mod.update_func(gvar, func)
        return mod


def _copy(x: Any) -> Any:
    return relax.op.call_dps_packed(COPY, [x], out_ty=x.ty)


@mutator
class _Buffers(PyExprMutator):
    def rewrite(self, func: relax.Function) -> relax.Function:
        self.inputs = list(func.params[: int(func.attrs["num_input"]) - 1])
        self.result = func.body.body
        self.copied: dict[Any, Any] = {}
        bounds = func.attrs.get("tir_var_upper_bound", {})
        new = self.visit_expr(func)
        return new.with_attr("num_input", len(self.inputs)).with_attr(
            "relax.rewrite_cuda_graph.capture_symbolic_vars", [str(name) for name in bounds]
        )

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> Any:
        self.builder_._begin_dataflow_block()
        if not self.copied:
            self.copied = {x: self.builder_.emit(_copy(x)) for x in self.inputs}
        for binding in block.bindings:
            if binding.var.same_as(self.result):
                value = self.visit_expr(binding.value)
                if isinstance(value, relax.Tuple):  # (logits, cache)
                    fields = [self._copied(field) for field in value.fields]
                    out = self.builder_.emit_output(relax.Tuple(fields))
                else:
                    out = self.builder_.emit_output(_copy(self.builder_.emit(value)))
                self.set_var_remap(binding.var, out)
            else:
                self.visit_binding(binding)
        return self.builder_._end_block()

    def _copied(self, x: Any) -> Any:
        return self.builder_.emit(_copy(x)) if isinstance(x.ty, relax.TensorType) else x

    def visit_var_(self, var: Any) -> Any:
        if var in self.copied:
            return self.copied[var]
        return super().visit_var_(var)


@tvm.transform.module_pass(opt_level=0, name="KeyGraphs")
class KeyGraphs:
    """Key every captured region by what it reads, not by its extents alone.

    Before::

        R.call_builtin_with_ctx("vm.builtin.cuda_graph.run_or_capture",
                                (capture, (kv_cache, params, ...), 0, R.shape([b])))

    After::

        key = R.call_packed("tvm_flashinfer.graph_key", (kv_cache, params, ...), R.shape([b]))
        R.call_builtin_with_ctx("vm.builtin.cuda_graph.run_or_capture",
                                (capture, (kv_cache, params, ...), 0, key))

    so a graph is never replayed for another cache, other weights, or a step of the same cache that
    launches differently.  Runs after RewriteCUDAGraph.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        updated = {}
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                keyed = _Keys(mod).visit_expr(func)
                if not keyed.same_as(func):
                    updated[gvar] = keyed
        if updated:
            mod = mod.clone()
            for gvar, func in updated.items():
                mod.update_func(gvar, func)
        return mod


@mutator
class _Keys(PyExprMutator):
    def visit_call_(self, call: relax.Call) -> Any:
        if not _runs_capture(call):
            return super().visit_call_(call)
        function, args, index, *extents = call.args[1].fields
        emit = self.builder_.emit
        reads = emit(self.visit_expr(args))
        shape = self.visit_expr(extents[0]) if extents else relax.ShapeExpr([])
        rank = len(shape.values) + 1
        key = emit(
            relax.Call(relax.ExternFunc(KEY), [reads, shape], ty_args=[relax.ShapeType(ndim=rank)])
        )
        fields = relax.Tuple([function, reads, index, key])
        return relax.Call(call.op, [call.args[0], fields], call.attrs, call.ty_args)


def _runs_capture(call: relax.Call) -> bool:
    op = call.op
    return (
        isinstance(op, tvm.ir.Op)
        and op.name == "relax.call_builtin_with_ctx"
        and str(call.args[0].global_symbol) == RUN_OR_CAPTURE
    )
