"""How operators are lowered for a CPU where TVM's own way does one element at a time.

``LegalizeOps(LEGALIZE_CPU)`` takes these instead of TVM's: functions of single elements become
arithmetic that is vectorised (vector_math.py), and layer norm is one loop over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, te, tirx
from tvm.script import tirx as T

from relax_passes import vector_math
from relax_passes.graph import dtype_of, ints, scalar_value, shape_of, static_int
from relax_passes.schedule_cpu import ROWS

__all__ = ["LEGALIZE_CPU"]

#: bfloat16 is not among those of single elements: TVM's own lowering of it reads a result twice.
DTYPES = ("float32", "float16")
NORM_DTYPES = (*DTYPES, "bfloat16")
#: Exponents that are multiplications.
MOST_EXPONENT = 8

Legalize = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def _default(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """What TVM does."""
    legalize: Legalize = call.op.get_attr("FLegalize")
    return legalize(bb, call)


def _elementwise(name: str, function: Callable[[Any], Any]) -> Legalize:
    """A function of one element, computed in float32."""

    def legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if dtype_of(call.args[0]) not in DTYPES:
            return _default(bb, call)
        return bb.call_te(_mapped(function), call.args[0], primfunc_name_hint=name)

    return legalize


def _mapped(function: Callable[[Any], Any]) -> Callable[[te.Tensor], te.Tensor]:
    def compute(x: te.Tensor) -> te.Tensor:
        def element(*at: Any) -> Any:
            return function(tirx.convert(x(*at)).astype("float32")).astype(x.dtype)

        return te.compute(x.shape, element, name="compute")

    return compute


def _gelu(x: Any) -> Any:
    half = tirx.const(0.5, "float32")
    return x * (half + vector_math.erf(x * tirx.const(math.sqrt(0.5), "float32")) * half)


def _gelu_tanh(x: Any) -> Any:
    half, one = tirx.const(0.5, "float32"), tirx.const(1.0, "float32")
    cubic = x * (one + tirx.const(0.044715, "float32") * x * x)
    return (
        half * x * (one + vector_math.tanh(tirx.const(math.sqrt(2 / math.pi), "float32") * cubic))
    )


def _power(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """x^2, x^3 ...; other exponents as TVM has them."""
    x, exponent = call.args[0], scalar_value(call.args[1])
    if (
        dtype_of(x) not in DTYPES
        or exponent is None
        or exponent not in range(1, MOST_EXPONENT + 1)
        or shape_of(call.args[1])
    ):
        return _default(bb, call)
    whole = int(exponent)
    power = _mapped(lambda value: vector_math.power(value, whole))
    return bb.call_te(power, x, primfunc_name_hint="power")


def _layer_norm(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis, row by row."""
    x, weight, bias = call.args
    shape = shape_of(x)
    width = static_int(shape[-1]) if shape else None
    dtypes = {dtype_of(arg) for arg in call.args}
    last = width is not None and ints(call.attrs.axes) in ([-1], [len(shape or ()) - 1])
    if not last or len(dtypes) != 1 or not dtypes <= set(NORM_DTYPES):
        return _default(bb, call)
    rows: Any = 1
    for extent in (shape or [])[:-1]:
        rows = rows * extent
    rows = tvm.sym.Analyzer().simplify(rows) if not isinstance(rows, int) else rows
    (dtype,) = dtypes
    kernel = _layer_norm_kernel(int(width or 0), dtype, float(call.attrs.epsilon))
    gvar = bb.add_func(kernel.with_attrs({"op_pattern": 8, ROWS: True}), "layer_norm")
    flat = bb.emit(relax.op.reshape(x, [rows, width]))
    out = relax.call_tir(gvar, [flat, weight, bias], relax.TensorType((rows, width), dtype))
    return relax.op.reshape(bb.emit(out), shape)


def _layer_norm_kernel(width: int, dtype: str, epsilon: float) -> Any:
    """x [n, width], weight and bias [width] -> out [n, width]."""
    lanes = math.gcd(width, 16)
    steps = width // lanes

    @T.prim_func(private=True, s_tir=True)
    def layer_norm(x: T.handle, weight: T.handle, bias: T.handle, out: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, width), dtype)
        W = T.match_buffer(weight, (width,), dtype)
        B = T.match_buffer(bias, (width,), dtype)
        Out = T.match_buffer(out, (n, width), dtype)
        for i in T.serial(n):
            with T.sblock("row"):
                row = T.axis.spatial(n, i)
                T.reads(X[row, 0:width], W[0:width], B[0:width])
                T.writes(Out[row, 0:width])
                mean = T.sblock_alloc_buffer((lanes,), "float32")
                scale = T.sblock_alloc_buffer((lanes,), "float32")
                for lane in T.vectorized(lanes):
                    mean[lane] = T.float32(0)
                    scale[lane] = T.float32(0)
                for k in T.serial(steps):
                    for lane in T.vectorized(lanes):
                        mean[lane] = mean[lane] + T.cast(X[row, k * lanes + lane], "float32")
                for lane in T.serial(lanes - 1):
                    mean[0] = mean[0] + mean[lane + 1]
                mean[0] = mean[0] / T.float32(width)
                for k in T.serial(steps):
                    for lane in T.vectorized(lanes):
                        scale[lane] = scale[lane] + (
                            T.cast(X[row, k * lanes + lane], "float32") - mean[0]
                        ) * (T.cast(X[row, k * lanes + lane], "float32") - mean[0])
                for lane in T.serial(lanes - 1):
                    scale[0] = scale[0] + scale[lane + 1]
                scale[0] = T.rsqrt(scale[0] / T.float32(width) + T.float32(epsilon))
                for k in T.serial(steps):
                    for lane in T.vectorized(lanes):
                        Out[row, k * lanes + lane] = T.cast(
                            (T.cast(X[row, k * lanes + lane], "float32") - mean[0])
                            * scale[0]
                            * T.cast(W[k * lanes + lane], "float32")
                            + T.cast(B[k * lanes + lane], "float32"),
                            dtype,
                        )

    return layer_norm


#: Operator: how it is lowered.
LEGALIZE_CPU: dict[str, Legalize] = {
    "relax.exp": _elementwise("exp", vector_math.exp),
    "relax.erf": _elementwise("erf", vector_math.erf),
    "relax.tanh": _elementwise("tanh", vector_math.tanh),
    "relax.sigmoid": _elementwise("sigmoid", vector_math.sigmoid),
    "relax.nn.gelu": _elementwise("gelu", _gelu),
    "relax.nn.gelu_tanh": _elementwise("gelu_tanh", _gelu_tanh),
    "relax.nn.silu": _elementwise("silu", lambda x: x * vector_math.sigmoid(x)),
    "relax.power": _power,
    "relax.nn.layer_norm": _layer_norm,
}
