"""Mixture-of-experts models on a CPU: mlc_llm has the kernels of its experts for GPUs only.

Two kinds of them. Those that multiply the rows of each expert by its weights share tiles among the
threads of a block: :func:`group_gemm` and :func:`dequantize_group_gemm` are in their place. The
rest use a thread for an element, and share nothing: :class:`ThreadsToLoops` makes loops of the
threads. One of those, that chooses the experts, writes before its own array: :func:`init_top_k` is
in the place of what does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm

#: Left alone by dlight, whose products of a matrix and a vector on a CPU take LLVM minutes each.
SCHEDULED = "tirx.is_scheduled"
_OPAQUE = 8  # TVM's OpPatternKind: not to be fused with others


def init_top_k(k: int, dtype: str, scores: Any, indices: Any) -> None:
    """The k best scores and their indices, before any was seen; called by TVM's script parser.

    mlc_llm's own stores each index at -1: registers that nothing else uses on a GPU, and on a CPU
    the four bytes before the array, which are its allocator's.
    """
    from tvm.script import tirx as T

    for slot in range(k):
        T.buffer_store(scores, T.min_value(dtype), indices=[slot])
        T.buffer_store(indices, slot, indices=[slot])


def group_gemm(x: Any, w: Any, indptr: Any) -> Any:
    """Rows ``[indptr[e], indptr[e + 1])`` of x times the weights of expert e, transposed.

    Parameters
    ----------
    x : nn.Tensor
        [rows, in_features].
    w : nn.Tensor
        [experts, out_features, in_features].
    indptr : nn.Tensor
        [experts + 1], int32, from 0 to rows.

    Returns
    -------
    nn.Tensor
        [rows, out_features], in x's dtype; sums are float32.
    """
    return _grouped(x, [w], indptr, w.shape[1], lambda w, e, n, k: w[e, n, k])


def dequantize_group_gemm(
    x: Any,
    w: Any,
    scale: Any,
    indptr: Any,
    quantize_dtype: str,
    indptr_dtype: str,
    group_size: int,
) -> Any:
    """As :func:`group_gemm`, of weights in groups along k: several to an element, a scale a group.

    Parameters
    ----------
    w : nn.Tensor
        [experts, out_features, words]: unsigned integers of 2**(bits - 1) - 1 and more bits.
    scale : nn.Tensor
        [experts, out_features, in_features / group_size].
    """
    from tvm import tirx

    assert indptr.dtype == indptr_dtype
    bits = tvm.DataType(quantize_dtype).bits
    each = tvm.DataType(w.dtype).bits // bits

    def weight(w: Any, scale: Any, e: Any, n: Any, k: Any) -> Any:
        shift = (k % each * bits).astype(w.dtype)
        code = (w[e, n, k // each] >> shift) & tirx.const(2**bits - 1, w.dtype)
        zero = tirx.const(2 ** (bits - 1) - 1, x.dtype)
        return (code.astype(x.dtype) - zero) * scale[e, n, k // group_size]

    return _grouped(x, [w, scale], indptr, w.shape[1], weight)


def _grouped(
    x: Any, weights: list[Any], indptr: Any, out_features: int, weight: Callable[..., Any]
) -> Any:
    from tvm import te
    from tvm.relax.frontend.nn import op

    experts, in_features = int(indptr.shape[0]) - 1, x.shape[1]

    def compute(x: Any, indptr: Any, *weights: Any) -> Any:
        e = te.reduce_axis((1, experts), "e")
        expert = te.compute(
            (x.shape[0],),
            lambda row: te.sum((indptr[e] <= row).astype("int32"), axis=e),
            name="expert_of_row",
        )
        k = te.reduce_axis((0, in_features), "k")

        def product(row: Any, n: Any) -> Any:
            w = weight(*weights, expert[row], n, k)
            return te.sum(x[row, k].astype("float32") * w.astype("float32"), axis=k)

        sums = te.compute((x.shape[0], out_features), product, name="rows_by_expert")
        if x.dtype == "float32":
            return sums
        return te.compute(sums.shape, lambda row, n: sums[row, n].astype(x.dtype), name="rounded")

    attrs = {"op_pattern": _OPAQUE, SCHEDULED: 1}
    return op.tensor_expr_op(compute, "group_gemm", args=[x, indptr, *weights], attrs=attrs)


@tvm.transform.module_pass(opt_level=0, name="ThreadsToLoops")
class ThreadsToLoops:
    """Make a loop of every loop over GPU threads, where the current target is a CPU.

    Before::

        for bx in T.thread_binding(n, thread="blockIdx.x"):
            for tx in T.thread_binding(1024, thread="threadIdx.x"): ...

    After::

        for bx in range(n):
            for tx in range(1024): ...

    Threads that share memory depend on one another, and stay: such a function isn't compiled for a
    CPU, and the error names it.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        from tvm import tirx

        if tvm.target.Target.current().kind.name != "llvm":
            return mod
        updated = {}
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc):
                body = _serial(func.body)
                if not body.same_as(func.body):
                    updated[gvar] = func.with_body(body).with_attr(SCHEDULED, True)
        if updated:
            mod = mod.clone()
            for gvar, func in updated.items():
                mod.update_func(gvar, func)
        return mod


def _serial(body: Any) -> Any:
    import tvm_ffi
    from tvm import tirx

    shares = False

    def look(node: Any) -> None:
        nonlocal shares
        if tirx.is_buffer_var(node) and str(node.scope()).startswith("shared"):
            shares = True

    tvm_ffi.structural_walk(body, look)
    if shares:
        return body

    def loop(node: Any) -> Any:
        if node.kind != tirx.ForKind.THREAD_BINDING:
            return node
        return tirx.For(node.loop_var, node.min, node.extent, tirx.ForKind.SERIAL, node.body)

    return tvm_ffi.structural_map(body, (tirx.For, loop))
