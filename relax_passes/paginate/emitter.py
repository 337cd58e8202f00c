"""Emit Relax operators, leaving out those that do nothing.

Exported graphs are full of layout operators that cancel once attention takes another layout than
the graph had: transposes back and forth, reshapes of reshapes, casts to the dtype a value already
has. They are dropped while emitting, so that what is left to compile is arithmetic.
"""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm_ffi import structural_equal

from relax_passes.graph import (
    dtype_of,
    ints,
    is_float,
    is_one,
    op_name,
    permutation,
    scalar_value,
    shape_of,
    static_int,
)


class Emitter:
    """A BlockBuilder whose ``emit`` simplifies layout operators against what was emitted before."""

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self.builder = builder
        self._value: dict[Any, Any] = {}

    def emit(self, expr: Any) -> Any:
        """Emit one expression; the result may be an earlier value that is equal to it."""
        if isinstance(expr, relax.Call):
            simple = self._simplify(expr)
            if simple is not expr:
                return simple if not isinstance(simple, relax.Call) else self.emit(simple)
        if not isinstance(expr, relax.Call | relax.Tuple | relax.TupleGetItem):
            return expr
        var = self.builder.emit(expr)
        if isinstance(expr, relax.Call):
            # The builder may have normalised the call: keep what it really bound.
            self._value[var] = expr
        return var

    def reshape(self, x: Any, shape: list[Any]) -> Any:
        return self.emit(relax.op.reshape(x, shape))

    def permute(self, x: Any, axes: list[int]) -> Any:
        return self.emit(relax.op.permute_dims(x, axes))

    def astype(self, x: Any, dtype: str) -> Any:
        return self.emit(relax.op.astype(x, dtype))

    def _simplify(self, call: relax.Call) -> Any:
        rule = _RULES.get(op_name(call))
        if rule is None or not isinstance(call.args[0].ty, relax.TensorType):
            return call
        found = rule(call, self._value.get(call.args[0]))
        return call if found is None else found


def _same_shape(a: list[Any] | None, b: list[Any] | None) -> bool:
    return (
        a is not None
        and b is not None
        and len(a) == len(b)
        and all(structural_equal(x, y) for x, y in zip(a, b, strict=True))
    )


def _reshape(call: relax.Call, source: Any) -> Any:
    x, shape = call.args
    if not isinstance(shape, relax.ShapeExpr):
        return None
    if _same_shape(shape_of(x), list(shape.values)):
        return x
    if op_name(source) == "reshape":
        return relax.op.reshape(source.args[0], shape)
    return None


def _expand_dims(call: relax.Call, _source: Any) -> Any:
    shape = shape_of(call.args[0])
    if shape is None:
        return None
    new = ints(call.attrs.axis)
    rank = len(shape) + len(new)
    added = {a % rank for a in new}
    rest = iter(shape)
    return relax.op.reshape(call.args[0], [1 if n in added else next(rest) for n in range(rank)])


def _squeeze(call: relax.Call, _source: Any) -> Any:
    shape = shape_of(call.args[0])
    if shape is None:
        return None
    over = call.attrs.axis
    gone = (
        {n for n, d in enumerate(shape) if is_one(d)}
        if over is None
        else {a % len(shape) for a in ints(over)}
    )
    return relax.op.reshape(call.args[0], [d for n, d in enumerate(shape) if n not in gone])


def _permute(call: relax.Call, source: Any) -> Any:
    x = call.args[0]
    shape = shape_of(x)
    if shape is None:
        return None
    axes = permutation(call, len(shape))
    if op_name(source) == "permute_dims":
        first = permutation(source, len(shape))
        return relax.op.permute_dims(source.args[0], [first[a] for a in axes])
    if [a for a in axes if not is_one(shape[a])] == [
        n for n in range(len(shape)) if not is_one(shape[n])
    ]:
        # Only axes of length 1 move.
        return relax.op.reshape(x, [shape[a] for a in axes])
    return None


def _astype(call: relax.Call, source: Any) -> Any:
    x, dtype = call.args[0], dtype_of_astype(call)
    if dtype_of(x) == dtype:
        return x
    if op_name(source) == "astype":
        origin = dtype_of(source.args[0])
        if _holds(origin, dtype_of(x)):
            # Widening first loses nothing.
            return relax.op.astype(source.args[0], dtype)
    return None


def dtype_of_astype(call: relax.Call) -> str:
    return str(call.attrs.dtype)


def _holds(narrow: str, wide: str) -> bool:
    """Whether every value of ``narrow`` is one of ``wide``."""
    if narrow in ("float16", "bfloat16"):
        return wide in ("float32", "float64")
    order = ("bool", "int32", "int64")
    if narrow in order and wide in order:
        return order.index(narrow) <= order.index(wide)
    return narrow == wide


def _strided_slice(call: relax.Call, _source: Any) -> Any:
    x = call.args[0]
    shape = shape_of(x)
    if shape is None:
        return None
    strides = call.args[4].fields if len(call.args) > 4 else [1] * len(call.args[1].fields)
    for axis, begin, end, step in zip(
        ints(call.args[1]), call.args[2].fields, call.args[3].fields, strides, strict=True
    ):
        last, extent = static_int(end), static_int(shape[axis])
        if static_int(begin) != 0 or static_int(step) != 1:
            return None
        whole = structural_equal(end, shape[axis]) or (
            last is not None and last >= (2**31 if extent is None else extent)
        )
        if not whole:
            return None
    return x


def _broadcast_to(call: relax.Call, _source: Any) -> Any:
    x, shape = call.args
    if isinstance(shape, relax.ShapeExpr) and _same_shape(shape_of(x), list(shape.values)):
        return x
    return None


def _neutral(neutral: float, both_sides: bool) -> Any:
    def rule(call: relax.Call, _source: Any) -> Any:
        a, b = call.args
        pairs = [(a, b), (b, a)] if both_sides else [(a, b)]
        for x, other in pairs:
            # x * 1 and integer x + 0 are exact; float x + 0 is not for x = -0.
            exact = neutral == 1 or not is_float(dtype_of(other))
            if exact and scalar_value(other) == neutral and (shape_of(other) or []) == []:
                return x
        return None

    return rule


_RULES = {
    "reshape": _reshape,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "permute_dims": _permute,
    "astype": _astype,
    "strided_slice": _strided_slice,
    "broadcast_to": _broadcast_to,
    "multiply": _neutral(1, True),
    "divide": _neutral(1, False),
    "add": _neutral(0, True),
    "subtract": _neutral(0, False),
}
