"""Walks over index expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tvm
from tvm import tirx

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    tirx.Add: lambda a, b: a + b,
    tirx.Sub: lambda a, b: a - b,
    tirx.Mul: lambda a, b: a * b,
    tirx.FloorDiv: tirx.floordiv,
    tirx.FloorMod: tirx.floormod,
    tirx.Min: tirx.min,
    tirx.Max: tirx.max,
    tirx.LT: lambda a, b: a < b,
    tirx.LE: lambda a, b: a <= b,
    tirx.GT: lambda a, b: a > b,
    tirx.GE: lambda a, b: a >= b,
    tirx.EQ: tirx.EQ,
    tirx.NE: tirx.NE,
}


def parts(expr: Any) -> Iterator[Any]:
    """``expr`` and every expression below it."""
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        if type(node) in _BINARY:
            stack += [node.a, node.b]
        elif isinstance(node, tirx.Cast):
            stack.append(node.value)
        elif isinstance(node, tirx.Select):
            stack += [node.condition, node.true_value, node.false_value]


_FIELDS = ("a", "b", "value", "body", "condition", "true_value", "false_value")


def subexpressions(expr: Any) -> Iterator[Any]:
    """``expr`` and all that is below it, calls, loads and Let included."""
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, tirx.IntImm | tirx.FloatImm | tvm.ir.Var):
            continue
        stack += [getattr(node, name) for name in _FIELDS if hasattr(node, name)]
        for name in ("args", "indices"):
            stack += list(getattr(node, name, ()))


def rebuild(expr: Any, leaf: Callable[[Any], Any]) -> Any:
    """``expr`` with every variable and number replaced by what ``leaf`` makes of it.

    None where ``expr`` has something that is no integer arithmetic.
    """
    if isinstance(expr, tvm.ir.Var | tirx.IntImm):
        return leaf(expr)
    fold = _BINARY.get(type(expr))
    if fold is not None:
        a, b = rebuild(expr.a, leaf), rebuild(expr.b, leaf)
        return None if a is None or b is None else fold(a, b)
    if isinstance(expr, tirx.Cast):
        return rebuild(expr.value, leaf)
    return None


def substitute(expr: Any, var: Any, value: Any) -> Any:
    """``expr`` with ``value`` in place of ``var``; None where it is no integer arithmetic."""
    return rebuild(
        expr, lambda node: value if isinstance(node, tvm.ir.Var) and node.same_as(var) else node
    )


def mentions(expr: Any, var: Any) -> bool:
    """Whether ``var`` occurs in ``expr``."""
    return any(isinstance(node, tvm.ir.Var) and node.same_as(var) for node in parts(expr))
