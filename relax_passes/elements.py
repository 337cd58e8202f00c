"""One element of a tensor as a formula: what the graph computes at a given index.

``ElementView.at(x, [h, s, t])`` walks back from ``x`` through layout operators (which only change
the index), creation operators (``arange``, ``full`` ...) and element-wise operators, and returns a
tree:

    Const(value)            a number
    Index(expr)             an integer that is arithmetic over index variables (from ``arange``)
    Load(tensor, index)     an element of a tensor the walk does not look into
    Apply(op, args, dtype)  an element-wise operator

A mask built from index arithmetic becomes a predicate over (query, key) this way, however many
expand_dims, broadcasts and casts its graph took, and an attention operand becomes "element (h // 4,
t, d) of k", which is how grouped heads are recovered without looking for a particular idiom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst

from relax_passes.element_layout import LAYOUT
from relax_passes.graph import (
    Graph,
    axis_of,
    dtype_of,
    ints,
    is_float,
    is_one,
    op_name,
    scalar_value,
    shape_of,
    static_int,
)
from relax_passes.known_shapes import bind_lengths


@dataclass(frozen=True)
class Const:
    value: float | int | bool


@dataclass(frozen=True)
class Index:
    expr: Any


@dataclass(frozen=True, eq=False)
class Load:
    tensor: Any
    index: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Apply:
    """``origin`` is the tensor that holds the value, where the graph has one."""

    op: str
    args: tuple[Element, ...]
    dtype: str
    origin: Load | None = None


Element = Const | Index | Load | Apply

ELEMENTWISE_UNARY = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "asin",
        "asinh",
        "astype",
        "atan",
        "atanh",
        "bitwise_not",
        "ceil",
        "clip",
        "cos",
        "cosh",
        "erf",
        "exp",
        "floor",
        "isfinite",
        "isinf",
        "isnan",
        "log",
        "logical_not",
        "negative",
        "nn.gelu",
        "nn.gelu_tanh",
        "nn.leakyrelu",
        "nn.relu",
        "nn.relu6",
        "nn.selu",
        "nn.silu",
        "nn.softplus",
        "round",
        "rsqrt",
        "sigmoid",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "tan",
        "tanh",
        "trunc",
    ]
)
ELEMENTWISE_BINARY = frozenset(
    [
        "add",
        "atan2",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "divide",
        "equal",
        "floor_divide",
        "floor_mod",
        "greater",
        "greater_equal",
        "left_shift",
        "less",
        "less_equal",
        "logical_and",
        "logical_or",
        "logical_xor",
        "maximum",
        "minimum",
        "mod",
        "multiply",
        "not_equal",
        "power",
        "right_shift",
        "subtract",
    ]
)
ELEMENTWISE = ELEMENTWISE_UNARY | ELEMENTWISE_BINARY | {"where"}
#: How integers are compared.
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "less": tirx.LT,
    "less_equal": tirx.LE,
    "greater": tirx.GT,
    "greater_equal": tirx.GE,
    "equal": tirx.EQ,
    "not_equal": tirx.NE,
}


class ElementView:
    """Element formulas over one function's graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.analyzer = tvm.sym.Analyzer()
        bind_lengths(self.analyzer, graph.func)

    def variable(self, name: str, extent: Any) -> Any:
        """A fresh index variable, known to lie in [0, extent)."""
        var = tirx.Var(name, "int64")
        self.analyzer.bind(var, tvm.ir.Range(0, extent))
        return var

    def at(
        self,
        expr: Any,
        index: Sequence[Any],
        stop: Callable[[Any], bool] = lambda var: False,
    ) -> Element:
        """The element of ``expr`` at ``index``; variables for which ``stop`` holds are not
        entered.
        """
        index = tuple(index)
        if isinstance(expr, relax.Var) and stop(expr):
            return Load(expr, index)
        bound = self.graph.resolve(expr)
        value = scalar_value(bound)
        if value is not None:
            return Const(value)
        moved = self.through_layout(bound, index)
        if isinstance(bound, GenericConst) or not isinstance(bound, relax.Call):
            return Load(expr, index) if moved is None else self.at(moved[0], moved[1], stop)
        name = op_name(bound)
        if moved is not None:
            return self.at(moved[0], moved[1], stop)
        made = self._created(bound, name, index)
        if made is not None:
            return made
        if name in ("tril", "triu"):
            return self._triangle(bound, name, index, stop)
        if name == "clip":
            return self._clipped(bound, index, stop)
        if name == "index_tensor":
            return self._indexed(bound, index, stop) or Load(expr, index)
        if name == "matmul" and (product := self._outer(bound, index, stop)) is not None:
            return product
        if name not in ELEMENTWISE:
            return Load(expr, index)
        args = tuple(
            self.at(a, self._broadcast(a, index), stop) if _is_tensor(a) else _number(a)
            for a in bound.args
            if _is_tensor(a) or (name in ELEMENTWISE_BINARY and tvm.ir.is_prim_expr(a))
        )
        origin = Load(expr, index) if isinstance(expr, relax.Var) else None
        return Apply(name, args, dtype_of(bound), origin)

    def _outer(
        self, call: relax.Call, index: Sequence[Any], stop: Callable[[Any], bool]
    ) -> Element | None:
        """A ``matmul`` that sums over one element is a product, as of positions and frequencies."""
        a, b = call.args
        left, right = shape_of(a), shape_of(b)
        if not left or not right or min(len(left), len(right)) < 2 or not is_one(left[-1]):
            return None
        zero = tirx.IntImm("int64", 0)
        lead = index[:-2]
        places = ((a, left, (index[-2], zero)), (b, right, (zero, index[-1])))
        args = []
        for x, shape, last in places:
            outer = lead[len(lead) - (len(shape) - 2) :]
            first = tuple(zero if is_one(n) else i for n, i in zip(shape[:-2], outer, strict=True))
            args.append(self.at(x, (*first, *last), stop))
        return Apply("multiply", tuple(args), dtype_of(call))

    def through_layout(self, call: Any, index: Sequence[Any]) -> tuple[Any, tuple[Any, ...]] | None:
        """If ``call`` only moves elements: its source and the index there; else None."""
        if isinstance(call, relax.TupleGetItem):
            return self._part_of_split(call, index)
        name = op_name(call)
        if name in ("concat", "stack"):
            return self._part_of_join(call, name, index)
        rule = LAYOUT.get(name)
        if rule is None:
            return None
        source = call.args[0]
        shape = shape_of(source)
        if shape is None:
            return None
        found = rule(self, call, shape, list(index))
        if found is None:
            return None
        return source, tuple(self.analyzer.simplify(i) for i in found)

    def _part_of_split(
        self, item: relax.TupleGetItem, index: Sequence[Any]
    ) -> tuple[Any, tuple[Any, ...]] | None:
        call = self.graph.resolve(item.tuple_value)
        if op_name(call) != "split":
            return None
        source = call.args[0]
        shape = shape_of(source) or []
        axis = axis_of(call.attrs.axis, len(shape)) if shape else 0
        cut = call.attrs.indices_or_sections
        extent = static_int(shape[axis]) if shape else None
        if isinstance(cut, int) or hasattr(cut, "value"):
            sections = int(cut)
            if extent is None:
                return None
            first = item.index * -(-extent // sections)
        else:
            first = 0 if item.index == 0 else ints(cut)[item.index - 1]
        moved = list(index)
        moved[axis] = self.analyzer.simplify(index[axis] + first)
        return source, tuple(moved)

    def _part_of_join(
        self, call: relax.Call, name: str, index: Sequence[Any]
    ) -> tuple[Any, tuple[Any, ...]] | None:
        """Which tensor of a ``concat`` or ``stack`` an element is of, where that is proven."""
        fields = self.graph.resolve(call.args[0])
        if not isinstance(fields, relax.Tuple):
            return None
        axis = 0 if call.attrs.axis is None else axis_of(call.attrs.axis, len(index))
        place = self.analyzer.simplify(index[axis])
        if name == "stack":
            which = static_int(place)
            rest = (*index[:axis], *index[axis + 1 :])
            return None if which is None else (fields.fields[which], tuple(rest))
        begin: Any = 0
        for field in fields.fields:
            shape = shape_of(field)
            if shape is None:
                return None
            end = begin + shape[axis]
            inside = tirx.all(place >= begin, place < end)
            if self.analyzer.can_prove(inside):
                moved = list(index)
                moved[axis] = self.analyzer.simplify(place - begin)
                return field, tuple(moved)
            begin = end
        return None

    def _triangle(
        self, call: relax.Call, name: str, index: Sequence[Any], stop: Callable[[Any], bool]
    ) -> Element:
        """``tril`` and ``triu``: the element, or 0 beyond the diagonal."""
        diagonal = call.args[1] if len(call.args) > 1 else tirx.IntImm("int64", 0)
        kept = "less_equal" if name == "tril" else "greater_equal"
        inside = Apply(kept, (Index(index[-1]), Index(index[-2] + diagonal)), "bool")
        dtype = dtype_of(call)
        zero = Const(False if dtype == "bool" else 0)
        return Apply("where", (inside, self.at(call.args[0], index, stop), zero), dtype)

    def _clipped(
        self, call: relax.Call, index: Sequence[Any], stop: Callable[[Any], bool]
    ) -> Element:
        element, dtype = self.at(call.args[0], index, stop), dtype_of(call)
        for op, limit in (("maximum", call.args[1]), ("minimum", call.args[2])):
            value = scalar_value(limit)
            if value is None:
                return Load(call, tuple(index))
            element = Apply(op, (element, Const(value)), dtype)
        return element

    def same(self, a: Any, b: Any) -> bool:
        """Whether two integer expressions are proven equal."""
        return bool(self.analyzer.can_prove_equal(a, b))

    def _broadcast(self, arg: Any, index: Sequence[Any]) -> tuple[Any, ...]:
        shape = shape_of(arg) or []
        tail = index[len(index) - len(shape) :]
        return tuple(
            tirx.IntImm("int64", 0) if is_one(d) else i for d, i in zip(shape, tail, strict=True)
        )

    def _created(self, call: relax.Call, name: str, index: Sequence[Any]) -> Element | None:
        if name == "arange":
            start, _, step = (_whole(a) for a in call.args)
            if all(tvm.ir.is_prim_expr(a) for a in (start, step)):
                number = Index(self.analyzer.simplify(start + index[0] * step))
                dtype = dtype_of(call)
                return Apply("astype", (number,), dtype) if is_float(dtype) else number
        if name == "cumsum":
            return self._counted(call, index)
        if name in ("ones", "ones_like", "zeros", "zeros_like"):
            value: Any = int(name.startswith("ones"))
            return Const(bool(value) if dtype_of(call) == "bool" else value)
        if name in ("full", "full_like"):
            fill = scalar_value(self.graph.resolve(call.args[1]))
            return None if fill is None else Const(fill)
        return None

    def _counted(self, call: relax.Call, index: Sequence[Any]) -> Element | None:
        """``cumsum`` of a constant, as of a mask of ones: how many there are up to here.

        The first element and the others are looked at apart, which settles ``diff`` of positions
        with a number put before them: transformers' test for packed sequences.
        """
        source = call.args[0]
        if call.attrs.axis is None or getattr(call.attrs, "exclusive", False):
            return None
        axis = axis_of(call.attrs.axis, len(index))
        extent = (shape_of(source) or index)[axis]
        places: list[Any] = [tirx.IntImm("int64", 0)]
        if not is_one(extent):
            places.append(self.variable("later", extent - 1) + 1)
        steps = {
            self._settled(self.at(source, (*index[:axis], place, *index[axis + 1 :])))
            for place in places
        }
        step = steps.pop()
        if steps or step is None:
            return None
        number = Index(self.analyzer.simplify((index[axis] + 1) * step))
        dtype = dtype_of(call)
        return Apply("astype", (number,), dtype) if is_float(dtype) else number

    def _settled(self, element: Element) -> int | None:
        """The whole number that a formula always is, a comparison among them."""
        while isinstance(element, Apply) and element.op == "astype":
            element = element.args[0]
        if isinstance(element, Const):
            return int(element.value) if element.value == int(element.value) else None
        if isinstance(element, Apply) and element.op in COMPARISONS:
            a, b = (to_prim(arg) for arg in element.args)
            if a is not None and b is not None:
                predicate = COMPARISONS[element.op](a, b)
                for truth in (True, False):
                    if self.analyzer.can_prove(predicate if truth else tirx.Not(predicate)):
                        return int(truth)
        return None

    def _indexed(
        self, call: relax.Call, index: Sequence[Any], stop: Callable[[Any], bool]
    ) -> Element | None:
        """``index_tensor(data, (i0, i1, ...))`` with integer formulas for every axis of data."""
        data, picks = call.args
        picks = self.graph.resolve(picks)
        if not isinstance(picks, relax.Tuple) or len(picks.fields) != len(shape_of(data) or ()):
            return None
        inner = []
        for pick in picks.fields:
            element = self.at(pick, self._broadcast(pick, index), stop)
            formula = to_prim(element)
            if formula is None:
                return None
            inner.append(self.analyzer.simplify(formula))
        return self.at(data, inner, stop)


def to_prim(element: Element) -> Any:
    """An integer formula as one arithmetic expression, None where it is not one."""
    if isinstance(element, Index):
        return element.expr
    if isinstance(element, Const) and isinstance(element.value, int):
        return tirx.IntImm("int64", int(element.value))
    if isinstance(element, Apply):
        args = [to_prim(a) for a in element.args]
        if any(a is None for a in args):
            return None
        if element.op == "astype" and element.dtype.startswith("int"):
            return args[0]
        fold = _INTEGER_OPS.get(element.op)
        return None if fold is None else fold(*args)
    return None


_INTEGER_OPS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "floor_divide": tirx.floordiv,
    "floor_mod": tirx.floormod,
    "minimum": tirx.min,
    "maximum": tirx.max,
    "negative": lambda a: -a,
}


def _whole(number: Any) -> Any:
    """A whole number given as a float, as an integer; other expressions unchanged."""
    if isinstance(number, tirx.FloatImm) and float(number.value).is_integer():
        return tirx.IntImm("int64", int(number.value))
    return number if not isinstance(number, tirx.FloatImm) else None


def _number(operand: Any) -> Element:
    """A number, or a symbolic length, beside a tensor."""
    return Const(float(operand.value)) if isinstance(operand, tirx.FloatImm) else Index(operand)


def _is_tensor(expr: Any) -> bool:
    return isinstance(getattr(expr, "ty", None), relax.TensorType)
