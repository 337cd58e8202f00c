"""Proof that everything outside attention treats each token by itself.

A full-sequence model may be fed its tokens in any chunks, of one sequence or of many side by side,
if outside attention row ``i`` of every value depends on token ``i`` (and its position) alone.
This module walks the graph and finds, for each value, the axis that counts tokens, or None for a
value that no token enters.  An operator that might mix tokens has no rule here, and the graph is
refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import relax

from relax_passes.element_layout import reshape_groups
from relax_passes.elements import (
    ELEMENTWISE_BINARY,
    ELEMENTWISE_UNARY,
    Apply,
    Const,
    ElementView,
)
from relax_passes.graph import (
    Graph,
    axis_of,
    ints,
    is_one,
    op_name,
    permutation,
    scalar_value,
    shape_of,
    static_int,
)

if TYPE_CHECKING:
    from relax_passes.paginate.layers import Layer


@tvm_ffi.register_error("PaginateError")
class PaginateError(ValueError):
    """The graph cannot be made stateful; the message is one sentence that says why.

    Registered, so that it is still of this class when it comes out of a pass run by TVM.
    """


class TokenAxes:
    """The token axis of every value the result needs, attentions being cut out.

    Attributes
    ----------
    order : the variables to compute, in program order; a layer stands for everything inside it
    axis : variable -> token axis, or None where no token enters
    positions : the variables that number the tokens, with the number of the first
    layer_of : variable -> the layer it is the result of
    """

    def __init__(
        self,
        graph: Graph,
        layers: Sequence[Layer],
        length: Any,
        inputs: dict[Any, int | None],
    ) -> None:
        self.graph = graph
        self.view = ElementView(graph)
        self.length = length
        self.layer_of = {layer.out.var: layer for layer in layers}
        self.axis: dict[Any, int | None] = dict(inputs)
        self.positions: dict[Any, int] = {}
        self.order: list[Any] = []
        needed = self._needed()
        for binding in graph.bindings:
            if binding.var in needed:
                self.order.append(binding.var)
                self.axis[binding.var] = self._visit(binding)

    def _needed(self) -> set[Any]:
        seen: set[Any] = set()
        stack = list(self.graph.outputs)
        while stack:
            var = stack.pop()
            if var in seen:
                continue
            seen.add(var)
            layer = self.layer_of.get(var)
            if layer is not None:
                stack.extend(layer.reads)
            elif var in self.graph.value:
                stack.extend(variables(self.graph.value[var]))
        return seen

    # -- one binding -----------------------------------------------------------------------

    def _visit(self, binding: relax.VarBinding) -> int | None:
        var, value = binding.var, binding.value
        layer = self.layer_of.get(var)
        if layer is not None:
            return self._layer(layer)
        if isinstance(value, relax.Var):
            return self.axis[value]
        if isinstance(value, relax.Tuple):
            axes = {self._of(f) for f in value.fields}
            if len(axes) > 1:
                raise PaginateError(
                    f"the tuple {var.name!r} mixes values with different token axes."
                )
            return axes.pop()
        if isinstance(value, relax.TupleGetItem):
            return self._of(value.tuple_value)
        if not isinstance(value, relax.Call):
            if isinstance(value, tvm.ir.GenericConst):
                return None
            raise PaginateError(
                f"{var.name!r} is a {type(value).__name__}, which is not proven to treat each "
                "token by itself."
            )
        name = op_name(value)
        rule = _RULES.get(name)
        if rule is None:
            shown = name or str(getattr(value.op, "name_hint", value.op))
            raise PaginateError(f"operator {shown!r} (value {var.name!r}) may mix tokens.")
        try:
            axis = rule(self, value, name)
        except _Mixes as why:
            raise PaginateError(
                f"operator {name!r} (value {var.name!r}) mixes tokens: {why}."
            ) from None
        self._check_shape(var, axis, name)
        if name == "arange" and axis is not None:
            self.positions[var] = int(value.args[0].value)
        elif name == "cumsum" and axis == axis_of(value.attrs.axis, len(shape_of(var) or ())):
            self.positions[var] = 1
        return axis

    def _of(self, expr: Any) -> int | None:
        if isinstance(expr, relax.Tuple):
            axes = {self._of(f) for f in expr.fields}
            if len(axes) > 1:
                raise _Mixes("its operands have their tokens along different axes")
            return axes.pop()
        if isinstance(expr, relax.Var):
            if expr not in self.axis:
                raise PaginateError(
                    f"{expr.name!r} is computed inside an attention and used outside of it."
                )
            return self.axis[expr]
        return None

    def _layer(self, layer: Layer) -> int:
        for role, rows in (("queries", layer.q), ("keys", layer.k), ("values", layer.v)):
            if self.axis[rows.tensor] != rows.axis:
                raise PaginateError(
                    f"the {role} of the attention {layer.site.name!r} are not made token by token."
                )
        for var in layer.reads[3:]:
            if self.axis[var] is not None:
                raise PaginateError(
                    f"the attention {layer.site.name!r} does something to its scores that depends "
                    f"on other tokens ({var.name!r})."
                )
        # The kernel's rows are tokens; so are those of whatever is a reshape of them.
        shape = shape_of(layer.out.var) or []
        axes = [n for n, extent in enumerate(shape) if self.is_length(extent)]
        behind = 1
        for extent in shape[axes[0] + 1 :] if axes else []:
            behind *= static_int(extent) or 0
        rows_of = layer.v.dim * (1 if layer.out.order == "BHS" else layer.q.heads)
        if len(axes) != 1 or behind != rows_of:
            raise PaginateError(
                f"the result of the attention {layer.site.name!r} has no axis of tokens."
            )
        return axes[0]

    def _check_shape(self, var: Any, axis: int | None, name: str) -> None:
        """Only the token axis may have the sequence length in its extent."""
        shape = shape_of(var)
        if shape is None:
            if isinstance(var.ty, relax.TupleType):
                return
            raise PaginateError(f"the result {var.name!r} of {name!r} has no known shape.")
        for n, extent in enumerate(shape):
            if n == axis:
                if not self.is_length(extent):
                    raise PaginateError(
                        f"operator {name!r} (value {var.name!r}) changes the number of tokens."
                    )
            elif static_int(extent) is None:
                raise PaginateError(
                    f"operator {name!r} (value {var.name!r}) makes a tensor whose axis {n} depends "
                    "on the sequence length besides its token axis."
                )

    def is_length(self, extent: Any) -> bool:
        return isinstance(extent, tvm.ir.Var) and extent.same_as(self.length)


class _Mixes(Exception):
    """Why an operator mixes tokens."""


def variables(expr: Any) -> list[Any]:
    """The Relax variables an expression reads."""
    if isinstance(expr, relax.Var):
        return [] if tvm.ir.is_prim_var(expr) else [expr]
    if isinstance(expr, relax.Call):
        return [v for a in expr.args for v in variables(a)]
    if isinstance(expr, relax.Tuple):
        return [v for f in expr.fields for v in variables(f)]
    if isinstance(expr, relax.TupleGetItem):
        return variables(expr.tuple_value)
    return []


# ---------------------------------------------------------------------------------------------
# rules: (axes, call, op name) -> token axis of the result


def _rank(expr: Any) -> int:
    shape = shape_of(expr)
    if shape is None:
        raise _Mixes("an operand has no known shape")
    return len(shape)


def _elementwise(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    """Numpy broadcasting: the token axes must meet, counted from the right."""
    found: set[int] = set()
    tensors = [a for a in call.args if isinstance(a.ty, relax.TensorType)]
    for arg in tensors:
        axis = axes._of(arg)
        if axis is not None:
            found.add(_rank(arg) - axis)
    if not found:
        return None
    if len(found) > 1:
        raise _Mixes("its operands have their tokens along different axes")
    back = found.pop()
    for arg in tensors:
        shape = shape_of(arg) or []
        if axes._of(arg) is None and len(shape) >= back and not is_one(shape[-back]):
            raise _Mixes("an operand without tokens has more than one row along the token axis")
    return max(_rank(a) for a in tensors) - back


def _same_axis(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    return axes._of(call.args[0])


def _matmul(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    a, b = call.args
    x, y = axes._of(a), axes._of(b)
    rank_a, rank_b = _rank(a), _rank(b)
    if rank_a < 2 or rank_b < 2:
        raise _Mixes("a matmul with a vector")
    rank = max(rank_a, rank_b)
    if x is not None and rank_a - x == 1:
        raise _Mixes("it sums over the tokens")
    if y is not None and rank_b - y == 2:
        raise _Mixes("it sums over the tokens")
    found = {rank - (rank_a - x)} if x is not None else set()
    if y is not None:
        found.add(rank - (rank_b - y))
    if len(found) > 1:
        raise _Mixes("both operands have tokens, along different axes")
    return found.pop() if found else None


def _reduce(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    rank = _rank(call.args[0])
    over = call.attrs.axis
    gone = set(range(rank)) if over is None else {axis_of(a, rank) for a in _list(over)}
    if axis is None:
        return None
    if axis in gone:
        raise _Mixes("it reduces over the tokens")
    keepdims = bool(getattr(call.attrs, "keepdims", True))
    return axis if keepdims else axis - sum(g < axis for g in gone)


def _normalise(axes: TokenAxes, call: relax.Call, name: str) -> int | None:
    """softmax, rms_norm, layer_norm ...: reduce over some axes and keep the shape."""
    axis = axes._of(call.args[0])
    rank = _rank(call.args[0])
    over = call.attrs.axis if hasattr(call.attrs, "axis") else call.attrs.axes
    if axis is not None and axis in {axis_of(a, rank) for a in _list(over)}:
        raise _Mixes("it normalises over the tokens")
    if any(axes._of(a) is not None for a in call.args[1:]):
        raise _Mixes(f"a weight of {name!r} depends on the tokens")
    return axis


def _list(value: Any) -> list[int]:
    try:
        return [int(v) for v in value]
    except TypeError:
        return [int(value)]


def _permute(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    return None if axis is None else permutation(call, _rank(call.args[0])).index(axis)


def _expand_dims(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    if axis is None:
        return None
    new = ints(call.attrs.axis)
    rank = _rank(call.args[0]) + len(new)
    added = {axis_of(a, rank) for a in new}
    return [n for n in range(rank) if n not in added][axis]


def _squeeze(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    if axis is None:
        return None
    shape = shape_of(call.args[0]) or []
    over = call.attrs.axis
    gone = (
        {n for n, d in enumerate(shape) if is_one(d)}
        if over is None
        else {axis_of(a, len(shape)) for a in _list(over)}
    )
    return axis - sum(g < axis for g in gone)


def _reshape(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    source = axes._of(call.args[0])
    if source is None:
        return None
    before, after = shape_of(call.args[0]), shape_of(call)
    if after is None and isinstance(call.args[1], relax.ShapeExpr):
        after = list(call.args[1].values)
    if before is None or after is None:
        raise _Mixes("it has no known shape")
    groups = reshape_groups(tvm.sym.Analyzer(), before, after)
    if groups is None:
        raise _Mixes("the token axis cannot be followed through it")
    for ours, theirs in groups:
        if source in ours:
            ours = [n for n in ours if not is_one(before[n])]
            theirs = [n for n in theirs if not is_one(after[n])]
            if ours == [source] and len(theirs) == 1:
                return theirs[0]
            raise _Mixes("it merges the token axis with another one")
    raise _Mixes("the token axis cannot be followed through it")


def _broadcast_to(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    source = axes._of(call.args[0])
    before = shape_of(call.args[0]) or []
    after = list(call.args[1].values)
    grown = len(after) - len(before)
    if source is not None:
        return source + grown
    lengths = [n for n, extent in enumerate(after) if axes.is_length(extent)]
    # One row for all tokens, written out once per token.
    return lengths[0] if len(lengths) == 1 else None


def _concat(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    fields = axes.graph.resolve(call.args[0])
    rank = _rank(fields.fields[0]) if isinstance(fields, relax.Tuple) else 0
    if axis is not None and axis_of(call.attrs.axis, rank) == axis:
        raise _Mixes("it appends along the token axis")
    return axis


def _stack(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    fields = axes.graph.resolve(call.args[0])
    if axis is None or not isinstance(fields, relax.Tuple):
        return axis
    new = axis_of(call.attrs.axis or 0, _rank(fields.fields[0]) + 1)
    return axis + (new <= axis)


def _split(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    if axis is not None and axis_of(call.attrs.axis, _rank(call.args[0])) == axis:
        raise _Mixes("it cuts the token axis")
    return axis


def _strided_slice(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    rank = _rank(call.args[0])
    if axis is None:
        return None
    for n, a in enumerate(ints(call.args[1])):
        if axis_of(a, rank) == axis:
            begin = static_int(call.args[2].fields[n])
            if begin != 0 or not axes.is_length((shape_of(call) or [])[axis]):
                raise _Mixes("it cuts the token axis")
    return axis


def _take(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    data, indices = call.args
    x, i = axes._of(data), axes._of(indices)
    over = 0 if call.attrs.axis is None else axis_of(call.attrs.axis, _rank(data))
    rank_i = len(shape_of(indices) or ())
    if x is not None and i is not None:
        raise _Mixes("both the data and the indices depend on the tokens")
    if i is not None:
        return over + i
    if x is None:
        return None
    if x == over:
        raise _Mixes("it picks along the token axis")
    return x if x < over else x + rank_i - 1


def _arange(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    start, end, step = call.args
    values = [static_int(v) for v in (start, end, step)]
    if None not in values:
        return None
    if values[0] is None or values[2] != 1:
        raise _Mixes("it numbers the tokens in another way than one by one")
    analyzer = tvm.sym.Analyzer()
    if not analyzer.can_prove_equal(end - start, axes.length):
        raise _Mixes("it is longer or shorter than the sequence")
    return 0


def _cumsum(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    """A sum along the tokens is a number of each token where every term is one."""
    axis = axes._of(call.args[0])
    if axis is None:
        return None
    rank = _rank(call.args[0])
    if call.attrs.axis is None:
        raise _Mixes("it sums over the tokens")
    if axis_of(call.attrs.axis, rank) != axis:
        return axis
    index = [tvm.tirx.Var(f"i{n}", "int64") for n in range(rank)]
    element = axes.view.at(call.args[0], index)
    while isinstance(element, Apply) and element.op == "astype":
        element = element.args[0]
    if not isinstance(element, Const) or element.value != 1:
        raise _Mixes("it sums over the tokens")
    if any(not is_one(n) for d, n in enumerate(shape_of(call) or []) if d != axis):
        raise _Mixes("it counts tokens in more than one row")
    return axis


def _repeat(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    over = call.attrs.axis
    if axis is not None and (over is None or axis_of(over, _rank(call.args[0])) == axis):
        raise _Mixes("it repeats tokens")
    return axis


def _tile(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    if axis is None:
        return None
    repeats = _list(call.attrs.repeats)
    from_right = _rank(call.args[0]) - axis
    if len(repeats) >= from_right and repeats[-from_right] != 1:
        raise _Mixes("it repeats tokens")
    return axis + max(0, len(repeats) - _rank(call.args[0]))


def _topk(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    axis = axes._of(call.args[0])
    if axis is not None and axis_of(call.attrs.axis, _rank(call.args[0])) == axis:
        raise _Mixes("it sorts tokens")
    return axis


def _full(axes: TokenAxes, call: relax.Call, _name: str) -> int | None:
    """A tensor of one value; along the token axis it is one row for every token."""
    if len(call.args) > 1 and scalar_value(axes.graph.resolve(call.args[1])) is None:
        raise _Mixes("its fill value is not a constant")
    shape = call.args[0]
    if isinstance(shape, relax.ShapeExpr):
        lengths = [n for n, extent in enumerate(shape.values) if axes.is_length(extent)]
        return lengths[0] if lengths else None
    return axes._of(shape)


_RULES: dict[str, Callable[[TokenAxes, relax.Call, str], int | None]] = {
    **dict.fromkeys(ELEMENTWISE_UNARY | ELEMENTWISE_BINARY | {"where"}, _elementwise),
    "matmul": _matmul,
    **dict.fromkeys(("sum", "mean", "max", "min", "prod", "variance", "std"), _reduce),
    **dict.fromkeys(
        ("nn.softmax", "nn.log_softmax", "nn.rms_norm", "nn.layer_norm"),
        _normalise,
    ),
    "permute_dims": _permute,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "flatten": _reshape,
    "broadcast_to": _broadcast_to,
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "strided_slice": _strided_slice,
    "take": _take,
    **dict.fromkeys(("topk", "sort", "argsort"), _topk),
    "repeat": _repeat,
    "tile": _tile,
    "arange": _arange,
    "cumsum": _cumsum,
    **dict.fromkeys(("full", "ones", "zeros", "full_like", "ones_like", "zeros_like"), _full),
}
