"""FuseRMSNorm: RMS normalisation as one kernel, with the residual addition before it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.script import tirx as T

from relax_passes import norm_cuda
from relax_passes.graph import (
    Graph,
    axis_of,
    dtype_of,
    is_float,
    op_name,
    scalar_value,
    shape_of,
    static_int,
)
from relax_passes.schedule_cpu import PARALLEL_ELEMENTS

#: Opaque to fusion, and scheduled already.
_ATTRS = {"op_pattern": 8, "tirx.is_scheduled": True}


@dataclass(frozen=True)
class _Norm:
    """``out = weight * cast(f32(x) * rsqrt(mean(f32(x)^2) + epsilon))`` found in a graph."""

    out: Any
    x: Any
    weight: Any
    epsilon: float
    residual: tuple[Any, Any] | None


@tvm.transform.module_pass(opt_level=0, name="FuseRMSNorm")
class FuseRMSNorm:
    """Replace the six operators of an RMS norm by one kernel.

    Before::

        h = R.add(x, y)
        s = R.power(h, R.const(2.0)); m = R.mean(s, axis=[-1], keepdims=True)
        r = R.rsqrt(R.add(m, R.const(1e-6)))
        o = R.multiply(weight, R.multiply(h, r))

    After::

        h, o = R.call_tir(cls.add_rms_norm, (x, y, weight), ...)

    In 16 bits the casts to float32 and back are part of the pattern.  Without a residual addition
    ``rms_norm`` has one output.  Each row is summed in a fixed order, whatever the batch.

    Parameters
    ----------
    target : tvm.target.Target | None
        CUDA's kernel is another one (norm_cuda.py); a CPU's by default.
    """

    def __init__(self, target: tvm.target.Target | None = None) -> None:
        self.on_cuda = target is not None and target.kind.name == "cuda"

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.on_cuda)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                norms = _find(func)
                if norms:
                    updated = relax.analysis.remove_all_unused(rewriter.rewrite(func, norms))
                    rewriter.builder_.update_func(gvar, updated)
        return rewriter.builder_.get()


# ---------------------------------------------------------------------------------------------
# matching


def _find(func: relax.Function) -> list[_Norm]:
    graph = Graph(func)
    place = {binding.var: n for n, binding in enumerate(graph.bindings)}
    found = []
    for binding in graph.bindings:
        norm = _match(graph, binding.var)
        if norm is not None:
            found.append(_with_residual(graph, place, norm))
    return found


def _match(graph: Graph, var: Any) -> _Norm | None:
    """``var`` as weight * normalised, in either order."""
    call = graph.value[var]
    if op_name(call) != "multiply" or not isinstance(var, relax.DataflowVar):
        return None
    for weight, scaled in (call.args, tuple(reversed(call.args))):
        shape = shape_of(weight)
        if not isinstance(weight, relax.Var | GenericConst) or shape is None or len(shape) != 1:
            continue
        inner = _strip_cast(graph, scaled)
        if op_name(inner) != "multiply":
            continue
        for wide, root in (inner.args, tuple(reversed(inner.args))):
            epsilon = _root_mean_square(graph, root, wide)
            if epsilon is None:
                continue
            x = _narrow(graph, wide)
            width = (shape_of(x) or [None])[-1]
            if static_int(width) == static_int(shape[0]) is not None:
                return _Norm(var, x, weight, epsilon, None)
    return None


def _root_mean_square(graph: Graph, root: Any, x: Any) -> float | None:
    """epsilon, if ``root`` is rsqrt(mean(x^2, -1, keepdims) + epsilon) in float32."""
    call = graph.resolve(root)
    if op_name(call) != "rsqrt" or dtype_of(call) != "float32":
        return None
    total = graph.resolve(call.args[0])
    if op_name(total) != "add":
        return None
    epsilon = scalar_value(graph.resolve(total.args[1]))
    mean = graph.resolve(total.args[0])
    if epsilon is None or op_name(mean) != "mean" or not mean.attrs.keepdims:
        return None
    rank = len(shape_of(mean.args[0]) or ())
    if mean.attrs.axis is None or [axis_of(a, rank) for a in mean.attrs.axis] != [rank - 1]:
        return None
    square = graph.resolve(mean.args[0])
    if op_name(square) == "power":
        of_x = scalar_value(graph.resolve(square.args[1])) == 2.0
        return float(epsilon) if of_x and square.args[0].same_as(x) else None
    if op_name(square) == "multiply" and all(a.same_as(x) for a in square.args):
        return float(epsilon)
    return None


def _strip_cast(graph: Graph, expr: Any) -> Any:
    call = graph.resolve(expr)
    return graph.resolve(call.args[0]) if op_name(call) == "astype" else call


def _narrow(graph: Graph, wide: Any) -> Any:
    """What was cast to float32, or ``wide`` itself."""
    call: Any = graph.value.get(wide)
    if op_name(call) == "astype" and is_float(dtype_of(call.args[0])):
        return call.args[0]
    return wide


def _with_residual(graph: Graph, place: dict[Any, int], norm: _Norm) -> _Norm:
    """Take along the addition that made x, where the weight is known by then."""
    call: Any = graph.value.get(norm.x)
    if not isinstance(norm.x, relax.DataflowVar) or op_name(call) != "add":
        return norm
    if place.get(norm.weight, -1) > place[norm.x]:
        return norm
    a, b = call.args
    shapes = [shape_of(norm.x), shape_of(a), shape_of(b)]
    same = all(s is not None and len(s) == len(shapes[0] or ()) for s in shapes) and all(
        tvm.sym.Analyzer().can_prove_equal(x, y)
        for s in shapes[1:]
        for x, y in zip(shapes[0] or (), s or (), strict=True)
    )
    if not same or dtype_of(a) != dtype_of(b):
        return norm
    return _Norm(norm.out, norm.x, norm.weight, norm.epsilon, (a, b))


# ---------------------------------------------------------------------------------------------
# rewriting


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, on_cuda: bool) -> None:
        super().__init__(mod)
        self.on_cuda = on_cuda
        self.norms: dict[Any, _Norm] = {}
        self.residuals: dict[Any, _Norm] = {}
        self.ready: dict[Any, Any] = {}
        self.bounds: dict[str, int] = {}

    def rewrite(self, func: relax.Function, norms: list[_Norm]) -> relax.Function:
        self.norms = {norm.out: norm for norm in norms}
        # A value may be normalised twice; its addition joins the first.
        self.residuals = {n.x: n for n in reversed(norms) if n.residual is not None}
        self.ready = {}
        attrs = func.attrs
        self.bounds = dict(attrs["tir_var_upper_bound"]) if _has(attrs) else {}
        return self.visit_expr(func)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        var = binding.var
        if var in self.residuals:
            norm = self.residuals[var]
            both = self._emit(norm, [self.visit_expr(e) for e in norm.residual or ()])
            self.ready[norm.out] = both[1]
            self.set_var_remap(var, both[0])
        elif var in self.ready:
            self.set_var_remap(var, self.ready[var])
        elif var in self.norms:
            norm = self.norms[var]
            self.set_var_remap(var, self._emit(norm, [self.visit_expr(norm.x)])[0])
        else:
            super().visit_var_binding_(binding)

    def _emit(self, norm: _Norm, inputs: list[Any]) -> list[Any]:
        """Call the kernel on rows [n, width]; returns its results in the shape of x."""
        emit = self.builder_.emit
        shape = shape_of(norm.x) or []
        width = int(shape[-1])
        rows: Any = 1
        for extent in shape[:-1]:
            rows = rows * extent
        rows = tvm.sym.Analyzer().simplify(rows) if not isinstance(rows, int) else rows
        x_dtype, dtype = dtype_of(norm.x), dtype_of(norm.out)
        residual = len(inputs) == 2
        if self.on_cuda:
            kernel = norm_cuda.kernel(width, x_dtype, dtype, norm.epsilon, residual)
        else:
            elements = self._elements(rows, width)
            kernel = _kernel(width, x_dtype, dtype, norm.epsilon, residual, elements)
        name = "add_rms_norm" if residual else "rms_norm"
        gvar = self.builder_.add_func(kernel.with_attrs(_ATTRS), name)
        flat = [emit(relax.op.reshape(x, [rows, width])) for x in inputs]
        types = [relax.TensorType((rows, width), x_dtype)] * residual
        types.append(relax.TensorType((rows, width), dtype))
        call = relax.call_tir(
            gvar, [*flat, self.visit_expr(norm.weight)], types if residual else types[0]
        )
        out = emit(call)
        outs = [emit(relax.TupleGetItem(out, n)) for n in range(2)] if residual else [out]
        return [emit(relax.op.reshape(o, shape)) for o in outs]

    def _elements(self, rows: Any, width: int) -> float:
        """The most elements the kernel sees in one call."""
        analyzer = tvm.sym.Analyzer()
        for var in tvm.tirx.analysis.undefined_vars(rows) if not isinstance(rows, int) else ():
            bound = self.bounds.get(var.name)
            if bound is None:
                return math.inf
            analyzer.bind(var, tvm.ir.Range(1, int(bound) + 1))
        most = rows if isinstance(rows, int) else analyzer.const_int_bound(rows).max_value
        return float(most) * width


def _has(attrs: Any) -> bool:
    return attrs is not None and "tir_var_upper_bound" in attrs


@functools.cache  # parsed once: TVMScript takes some 60 ms
def _kernel(
    width: int, x_dtype: str, dtype: str, epsilon: float, residual: bool, elements: float
) -> Any:
    """x [n, width] (and y to add), weight [width] -> (h [n, width],) out [n, width]."""
    lanes = math.gcd(width, 16)
    steps = width // lanes
    rows = T.parallel if elements >= PARALLEL_ELEMENTS else T.serial
    if residual:

        @T.prim_func(private=True, s_tir=True)
        def add_rms_norm(
            x: T.handle, y: T.handle, weight: T.handle, h: T.handle, out: T.handle
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int64()
            X = T.match_buffer(x, (n, width), x_dtype)
            Y = T.match_buffer(y, (n, width), x_dtype)
            W = T.match_buffer(weight, (width,), dtype)
            H = T.match_buffer(h, (n, width), x_dtype)
            Out = T.match_buffer(out, (n, width), dtype)
            for i in rows(n):
                with T.sblock("row"):
                    T.reads()
                    T.writes()
                    acc = T.sblock_alloc_buffer((lanes,), "float32")
                    for lane in T.vectorized(lanes):
                        acc[lane] = T.float32(0)
                    for k in T.serial(steps):
                        for lane in T.vectorized(lanes):
                            H[i, k * lanes + lane] = X[i, k * lanes + lane] + Y[i, k * lanes + lane]
                        for lane in T.vectorized(lanes):
                            acc[lane] = acc[lane] + T.cast(
                                H[i, k * lanes + lane], "float32"
                            ) * T.cast(H[i, k * lanes + lane], "float32")
                    for lane in T.serial(lanes - 1):
                        acc[0] = acc[0] + acc[lane + 1]
                    acc[0] = T.rsqrt(acc[0] / T.float32(width) + T.float32(epsilon))
                    for k in T.serial(steps):
                        for lane in T.vectorized(lanes):
                            Out[i, k * lanes + lane] = W[k * lanes + lane] * T.cast(
                                T.cast(H[i, k * lanes + lane], "float32") * acc[0], dtype
                            )

        return add_rms_norm

    @T.prim_func(private=True, s_tir=True)
    def rms_norm(x: T.handle, weight: T.handle, out: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, width), x_dtype)
        W = T.match_buffer(weight, (width,), dtype)
        Out = T.match_buffer(out, (n, width), dtype)
        for i in rows(n):
            with T.sblock("row"):
                T.reads()
                T.writes()
                acc = T.sblock_alloc_buffer((lanes,), "float32")
                for lane in T.vectorized(lanes):
                    acc[lane] = T.float32(0)
                for k in T.serial(steps):
                    for lane in T.vectorized(lanes):
                        acc[lane] = acc[lane] + T.cast(X[i, k * lanes + lane], "float32") * T.cast(
                            X[i, k * lanes + lane], "float32"
                        )
                for lane in T.serial(lanes - 1):
                    acc[0] = acc[0] + acc[lane + 1]
                acc[0] = T.rsqrt(acc[0] / T.float32(width) + T.float32(epsilon))
                for k in T.serial(steps):
                    for lane in T.vectorized(lanes):
                        Out[i, k * lanes + lane] = W[k * lanes + lane] * T.cast(
                            T.cast(X[i, k * lanes + lane], "float32") * acc[0], dtype
                        )

    return rms_norm
