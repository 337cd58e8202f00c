"""Small helpers to read a Relax function: bindings, users, shapes, scalar constants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Set
from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst, Op


def op_name(expr: Any) -> str:
    """``"add"`` for ``relax.add``, ``"nn.softmax"`` for ``relax.nn.softmax``, ``""`` for no op
    call.
    """
    if isinstance(expr, relax.Call) and isinstance(expr.op, Op):
        return str(expr.op.name).removeprefix("relax.")
    return ""


def shape_of(expr: Any) -> list[Any] | None:
    """The dimensions of a tensor expression, None if they are not known one by one."""
    ty = expr.ty
    if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
        return None
    return list(ty.shape.values)


def dtype_of(expr: Any) -> str:
    """The dtype of a tensor expression, as text."""
    return str(expr.ty.dtype.dtype)


def is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def static_int(dim: Any) -> int | None:
    """The value of a dimension known now, else None."""
    if isinstance(dim, int):
        return dim
    return int(dim.value) if isinstance(dim, tvm.tirx.IntImm) else None


def is_one(dim: Any) -> bool:
    return static_int(dim) == 1


def scalar_value(expr: Any) -> float | int | bool | None:
    """The value of a one-element constant, else None."""
    if isinstance(expr, GenericConst) and isinstance(expr.ty, relax.TensorType):
        array = expr.value.numpy()
        if array.size == 1:
            return array.reshape(()).item()
    if isinstance(expr, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        return expr.value
    return None


def ints(attr: Any) -> list[int]:
    """An integer-list attribute or tuple argument as Python ints."""
    fields = attr.fields if isinstance(attr, relax.Tuple) else attr
    return [int(v.value) if hasattr(v, "value") else int(v) for v in fields]


def axis_of(attr: Any, rank: int) -> int:
    """An axis attribute, made non-negative."""
    axis = int(attr)
    return axis + rank if axis < 0 else axis


def permutation(call: relax.Call, rank: int) -> list[int]:
    """The axes of a permute_dims call (None means reversed)."""
    axes = call.attrs.axes
    return list(reversed(range(rank))) if axes is None else [axis_of(a, rank) for a in axes]


class Graph:
    """Bindings of one Relax function in order, what each variable is bound to, and who reads it.

    Only straight-line functions are described: ``If`` and nested functions stay opaque values.
    """

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.bindings: list[relax.VarBinding] = []
        self.value: dict[Any, Any] = {}
        self.users: dict[Any, list[Any]] = defaultdict(list)
        self._reads: dict[Any, list[Any]] = {}
        self._live: frozenset[Any] | None = None
        for block in func.body.blocks:
            for binding in block.bindings:
                self.bindings.append(binding)
                value = binding.value
                self.value[binding.var] = value
                self._reads[binding.var] = list(_reads(value))
                for var in self._reads[binding.var]:
                    self.users[var].append(binding.var)
        self.outputs = set(_reads(func.body.body))
        for var in list(self.outputs):
            # A tuple is returned with what it holds.
            while isinstance(self.value.get(var), relax.Var | relax.Tuple):
                held = list(_reads(self.value[var]))
                self.outputs.update(held)
                var = held[0] if isinstance(self.value[var], relax.Var) else None

    def reads(self, var: Any) -> list[Any]:
        """The variables that the value of ``var`` names."""
        return self._reads.get(var, [])

    def resolve(self, expr: Any) -> Any:
        """What a variable is bound to, looking through plain aliases; other expressions
        unchanged.
        """
        while expr in self.value:
            bound = self.value[expr]
            if isinstance(bound, relax.Var):
                expr = bound
                continue
            if isinstance(bound, relax.TupleGetItem):
                source = self.value.get(bound.tuple_value, bound.tuple_value)
                if isinstance(source, relax.Tuple):
                    expr = source.fields[bound.index]
                    continue
            return bound
        return expr

    def reached(self, var: Any, live: Set[Any], stop: Any) -> set[Any]:
        """``var`` and the live variables computed from it, but not through ``stop``."""
        seen: set[Any] = set()
        queue = [var]
        while queue:
            current = queue.pop()
            if current in seen or current.same_as(stop):
                continue
            seen.add(current)
            queue.extend(user for user in self.users[current] if user in live)
        return seen

    def live(self) -> frozenset[Any]:
        """The variables that the function's result depends on."""
        if self._live is None:
            seen: set[Any] = set()
            stack = list(self.outputs)
            while stack:
                var = stack.pop()
                if var not in seen:
                    seen.add(var)
                    stack.extend(self._reads.get(var, ()))
            self._live = frozenset(seen)
        return self._live


def _reads(expr: Any) -> Iterator[Any]:
    """The Relax variables an expression names."""
    if isinstance(expr, relax.Var):
        if not tvm.ir.is_prim_var(expr):
            yield expr
    elif isinstance(expr, relax.Call):
        for arg in expr.args:
            yield from _reads(arg)
    elif isinstance(expr, relax.Tuple):
        for item in expr.fields:
            yield from _reads(item)
    elif isinstance(expr, relax.TupleGetItem):
        yield from _reads(expr.tuple_value)
    elif isinstance(expr, relax.If | relax.Function | relax.SeqExpr):
        yield from relax.analysis.free_vars(expr)
