"""Shapes of symbolic lengths, simplified by what is known of the lengths.

torch.export says that a length is 2 at least, TVM's importer writes that down
(``tir_var_lower_bound``), and Relax makes no use of it: ``x[:, :1]`` has ``min(1, n)`` columns, and
two shapes that are the same only because of it make a third that is not known at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import relax
from tvm_ffi import structural_equal


def with_known_shapes(func: relax.Function) -> relax.Function:
    """``func`` with types as exact as the bounds of its lengths make them.

    Before (``n`` is 2 at least)::

        x: R.Tensor((2, T.min(1, n))) = R.strided_slice(ids, axes=[1], begin=[0], end=[1])
        y: R.Tensor((2, T.min(1, n) + n)) = R.concat((x, ids), axis=1)
        z: R.Tensor(ndim=2) = R.subtract(<n columns of y>, <n others>)

    After::

        x: R.Tensor((2, 1)) = ...
        y: R.Tensor((2, 1 + n)) = ...
        z: R.Tensor((2, n)) = ...

    A function in which nothing changes is returned as it is.
    """
    analyzer = tvm.sym.Analyzer()
    if not bind_lengths(analyzer, func):
        return func
    builder = relax.BlockBuilder()
    builder.begin_scope(list(func.params))
    # Conditionals and nested functions are not entered, nor is what they read changed.
    kept = {var for binding in _bindings(func) for var in _read_inside(binding.value)}
    known: dict[Any, Any] = {}
    blocks = []
    for block in func.body.blocks:
        bindings = []
        for binding in block.bindings:
            new = binding
            if isinstance(binding, relax.VarBinding) and binding.var not in kept:
                new = _refined(binding, known, analyzer, builder)
            elif known and isinstance(binding, relax.MatchCast):
                new = relax.MatchCast(binding.var, _renamed(binding.value, known), binding.ty)
            if not new.var.same_as(binding.var):
                known[binding.var] = new.var
            bindings.append(new)
        kind = relax.DataflowBlock if isinstance(block, relax.DataflowBlock) else relax.BindingBlock
        blocks.append(kind(bindings))
    builder.end_scope()
    if not known:
        return func
    body = relax.SeqExpr(blocks, _renamed(func.body.body, known))
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)


def _refined(
    binding: relax.VarBinding, known: dict[Any, Any], analyzer: Any, builder: relax.BlockBuilder
) -> relax.VarBinding:
    """The binding, of a new variable if its type is more exact than before."""
    var, value = binding.var, _renamed(binding.value, known)
    changed = value is not binding.value
    if changed:
        value = builder.normalize(value)
    ty = _simplified(value.ty, analyzer)
    if not changed and ty is value.ty:
        return binding
    if ty is not value.ty and isinstance(value, relax.Call):
        value = relax.Call(value.op, value.args, value.attrs, value.ty_args, value.span, ty)
    if not structural_equal(ty, var.ty):
        var = type(var)(var.name, ty)
    return relax.VarBinding(var, value)


def bind_lengths(analyzer: Any, func: Any) -> bool:
    """Tell ``analyzer`` the bounds of the function's lengths; returns whether there are any."""
    attrs = getattr(func, "attrs", None) or {}
    lower, upper = (attrs.get(f"tir_var_{side}_bound") or {} for side in ("lower", "upper"))
    if not lower:
        return False
    lengths = [var for var in relax.analysis.defined_symbolic_vars(func) if var.name in lower]
    for var in lengths:
        first = int(lower[var.name])
        last = int(upper[var.name]) if var.name in upper else tvm.sym.ConstIntBound.POS_INF
        analyzer.update(var, tvm.sym.ConstIntBound(first, last))
    return bool(lengths)


def _simplified(ty: Any, analyzer: Any) -> Any:
    """A tensor's type with simpler dimensions; ``ty`` itself where there are none."""
    if isinstance(ty, relax.TensorType) and isinstance(ty.shape, relax.ShapeExpr):
        plain = (tvm.ir.Var, tvm.tirx.IntImm)
        dims = [n if isinstance(n, plain) else analyzer.simplify(n) for n in ty.shape.values]
        if not all(map(structural_equal, dims, ty.shape.values)):
            return relax.TensorType(dims, ty.dtype, ty.vdevice)
    return ty


def _bindings(func: relax.Function) -> Iterator[Any]:
    for block in func.body.blocks:
        yield from block.bindings


def _read_inside(value: Any) -> list[Any]:
    """The variables that a conditional or a nested function reads."""
    opaque = isinstance(value, relax.If | relax.Function | relax.SeqExpr)
    return list(relax.analysis.free_vars(value)) if opaque else []


def _renamed(expr: Any, known: dict[Any, Any]) -> Any:
    """``expr`` with new variables in place of the old; itself where it names none of them."""
    if isinstance(expr, relax.Var):
        return known.get(expr, expr)
    if isinstance(expr, relax.Call):
        args = [_renamed(arg, known) for arg in expr.args]
        if any(a is not b for a, b in zip(args, expr.args, strict=True)):
            return relax.Call(expr.op, args, expr.attrs, expr.ty_args, expr.span)
    elif isinstance(expr, relax.Tuple):
        fields = [_renamed(field, known) for field in expr.fields]
        if any(a is not b for a, b in zip(fields, expr.fields, strict=True)):
            return relax.Tuple(fields)
    elif isinstance(expr, relax.TupleGetItem):
        source = _renamed(expr.tuple_value, known)
        if source is not expr.tuple_value:
            return relax.TupleGetItem(source, expr.index)
    return expr
