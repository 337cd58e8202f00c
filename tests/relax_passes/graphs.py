"""Small Relax functions the tests look at, built operator by operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import relax, tirx

HEADS, DIM = 4, 8
SEQ = tirx.Var("seq_len", "int64")


class Graph:
    """A BlockBuilder with ``R``-like shorthands: ``g.add(a, b)`` emits ``relax.op.add(a, b)``."""

    def __init__(self) -> None:
        self.builder = relax.BlockBuilder()

    def __getattr__(self, name: str) -> Callable[..., relax.Var]:
        op = getattr(relax.op if hasattr(relax.op, name) else relax.op.nn, name)
        return lambda *args, **kwargs: self.builder.emit(op(*args, **kwargs))


def build(
    body: Callable[..., Any], *params: relax.Var, num_input: int | None = None
) -> relax.Function:
    """The function ``body(graph, *params)`` returns the result of."""
    graph = Graph()
    attrs = {"num_input": len(params) if num_input is None else num_input}
    with graph.builder.function("main", list(params), attrs):
        with graph.builder.dataflow():
            result = body(graph, *params)
            if isinstance(result, tuple):
                result = relax.Tuple(list(result))
            out = graph.builder.emit_output(result)
        graph.builder.emit_func_output(out)
    return graph.builder.get()["main"]


def tensor(name: str, *shape: Any, dtype: str = "float32") -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, dtype))


def qkv(length: Any = SEQ, kv_heads: int = HEADS) -> tuple[relax.Var, relax.Var, relax.Var]:
    """q [1, HEADS, S, DIM], k and v [1, kv_heads, S, DIM]."""
    return (
        tensor("q", 1, HEADS, length, DIM),
        tensor("k", 1, kv_heads, length, DIM),
        tensor("v", 1, kv_heads, length, DIM),
    )


def scores(g: Graph, q: relax.Var, k: relax.Var) -> relax.Var:
    """q kT / sqrt(DIM)."""
    raw = g.matmul(q, g.permute_dims(k, [0, 1, 3, 2]))
    return g.multiply(raw, relax.const(1 / math.sqrt(DIM), "float32"))


def indices(g: Graph, length: Any = SEQ) -> tuple[relax.Var, relax.Var]:
    """Query index [S, 1] and key index [1, S]."""
    numbers = g.arange(0, length, 1, "int64")
    return g.expand_dims(numbers, 1), g.expand_dims(numbers, 0)


def masked(g: Graph, x: relax.Var, keep: relax.Var) -> relax.Var:
    """x where ``keep`` holds, else -inf, by adding a mask."""
    zero, minus = relax.const(0.0, "float32"), relax.const(-math.inf, "float32")
    return g.add(x, g.where(keep, zero, minus))


def causal_attention(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
    """softmax(masked q kT / sqrt(DIM)) v."""
    query, key = indices(g, q.ty.shape[2])
    return g.matmul(g.softmax(masked(g, scores(g, q, k), g.less_equal(key, query))), v)
