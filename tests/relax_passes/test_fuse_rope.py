"""Rotations are taken out of the graph where they are proven, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from graphs import DIM, HEADS, Graph, build, causal_attention, tensor
from tvm import relax, tirx

from relax_passes.paginate import PaginateAttention
from relax_passes.report import Report
from tvm_flashinfer.jit import KernelArtifact

WIDTH, VOCAB = HEADS * DIM, 16
FREQUENCIES = (10000.0 ** (-np.arange(0, DIM, 2) / DIM)).astype("float32")


def angles(g: Graph, seq: Any, start: int) -> relax.Var:
    """[1, 1, S, DIM / 2]."""
    numbers = g.astype(g.arange(start, seq + start, 1, "int64"), "float32")
    return g.multiply(
        g.reshape(numbers, [1, 1, seq, 1]), relax.const(FREQUENCIES[None, None, None])
    )


def halves(g: Graph, x: relax.Var, angle: relax.Var, sign: float = -1.0) -> relax.Var:
    """As in LLaMA: pairs (i, i + DIM / 2)."""
    both = g.concat([angle, angle], -1)
    low = g.strided_slice(x, [3], [0], [DIM // 2])
    high = g.strided_slice(x, [3], [DIM // 2], [DIM])
    turned = g.concat([g.multiply(high, relax.const(sign, "float32")), low], -1)
    if sign == -1.0:
        turned = g.concat([g.negative(high), low], -1)
    return g.add(g.multiply(x, g.cos(both)), g.multiply(turned, g.sin(both)))


def neighbours(g: Graph, x: relax.Var, angle: relax.Var) -> relax.Var:
    """As in GPT-J: pairs (2i, 2i + 1)."""
    even = g.strided_slice(x, [3], [0], [DIM], [2])
    odd = g.strided_slice(x, [3], [1], [DIM], [2])
    cos, sin = g.cos(angle), g.sin(angle)
    first = g.subtract(g.multiply(even, cos), g.multiply(odd, sin))
    second = g.add(g.multiply(odd, cos), g.multiply(even, sin))
    return g.reshape(g.stack([first, second], 4), x.ty.shape)


def partial(g: Graph, x: relax.Var, angle: relax.Var) -> relax.Var:
    """The first half of a head is rotated."""
    angle = g.strided_slice(angle, [3], [0], [DIM // 4])
    both = g.concat([angle, angle], -1)
    head, rest = (g.strided_slice(x, [3], [a], [a + DIM // 2]) for a in (0, DIM // 2))
    low, high = (g.strided_slice(head, [3], [a], [a + DIM // 4]) for a in (0, DIM // 4))
    turned = g.concat([g.negative(high), low], -1)
    rotated = g.add(g.multiply(head, g.cos(both)), g.multiply(turned, g.sin(both)))
    return g.concat([rotated, rest], -1)


def model(
    rotate_q: Callable[..., Any], rotate_k: Callable[..., Any], start: int = 0, sums: int = 0
) -> Any:
    seq = tirx.Var("seq_len", "int64")
    ids, table = tensor("input_ids", 1, seq, dtype="int64"), tensor("table", VOCAB, WIDTH)

    def body(g: Graph, ids: relax.Var, table: relax.Var) -> relax.Var:
        flat = g.reshape(g.astype(ids, "int32"), [seq])
        x = g.reshape(g.take(table, flat, axis=0), [1, seq, WIDTH])
        for _ in range(sums):
            x = g.add(x, x)
        heads = g.permute_dims(g.reshape(x, [1, seq, HEADS, DIM]), [0, 2, 1, 3])
        angle = angles(g, seq, start)
        out = causal_attention(g, rotate_q(g, heads, angle), rotate_k(g, heads, angle), heads)
        flat = g.reshape(g.permute_dims(out, [0, 2, 1, 3]), [1, seq, WIDTH])
        return g.matmul(flat, g.permute_dims(table))

    return tvm.IRModule({"main": build(body, ids, table, num_input=1)})


def paginate(module: tvm.IRModule, **options: Any) -> tuple[tvm.IRModule, str]:
    report = Report()
    made = PaginateAttention(
        build=lambda _: KernelArtifact("", "", "kernel"), report=report, **options
    )(module)
    (site,) = report.sites
    return made, site.rope


@pytest.mark.parametrize("style", [halves, neighbours, partial])
def test_rotations_are_the_caches(style: Callable[..., Any]) -> None:
    made, rope = paginate(model(style, style))
    assert rope == "fused"
    decode, create = made["decode"].script(), made["create_kv_cache"].script()
    assert "cos" not in decode
    assert "query_positions" not in decode
    assert "kv_cache_create_rope" in create


def test_deep_models() -> None:
    """Two ways to a value at each of many sums: it is looked at once all the same."""
    assert paginate(model(halves, halves, sums=400))[1] == "fused"


def test_frequencies_and_pairs() -> None:
    made, _ = paginate(model(neighbours, neighbours))
    calls: list[Any] = []

    def visit(e: Any) -> None:
        if isinstance(e, relax.Call) and len(e.args) > 6:
            calls.append(e)

    relax.analysis.post_order_visit(made["create_kv_cache"], visit)
    frequencies, magnitude, interleaved = calls[0].args[-3:]
    np.testing.assert_array_equal(frequencies.value.numpy(), FREQUENCIES)
    assert (float(magnitude.value), int(interleaved.value)) == (1.0, 1)


def plain(_g: Graph, x: relax.Var, _angle: relax.Var) -> relax.Var:
    return x


def wrong_sign(g: Graph, x: relax.Var, angle: relax.Var) -> relax.Var:
    return halves(g, x, angle, 1.0)


def faster(g: Graph, x: relax.Var, angle: relax.Var) -> relax.Var:
    return halves(g, x, g.multiply(angle, relax.const(2.0, "float32")))


def from_table(g: Graph, x: relax.Var, _angle: relax.Var) -> relax.Var:
    """Cosines and sines as a checkpoint keeps them: rows of a table, by position."""
    seq = x.ty.shape[2]
    angle = np.arange(32, dtype="float32")[:, None] * np.tile(FREQUENCIES, 2)
    positions = g.arange(0, seq, 1, "int64")
    cos, sin = (
        g.reshape(g.take(relax.const(table), positions, axis=0), [1, 1, seq, DIM])
        for table in (np.cos(angle), np.sin(angle))
    )
    low, high = (g.strided_slice(x, [3], [a], [a + DIM // 2]) for a in (0, DIM // 2))
    turned = g.concat([g.negative(high), low], -1)
    return g.add(g.multiply(x, cos), g.multiply(turned, sin))


def test_tables_stay_in_the_graph() -> None:
    """Rounded sines say no frequency for certain: rows of the table are read by position."""
    made, rope = paginate(model(from_table, from_table))
    assert rope == "not rotated"
    decode = made["decode"].script()
    assert "kv_cache_query_positions" in decode and "R.take" in decode
    assert "kv_cache_create_rope" not in made["create_kv_cache"].script()


@pytest.mark.parametrize(
    ("q", "k", "start", "reason"),
    [
        (plain, plain, 0, "not rotated"),
        (halves, plain, 0, "only the queries are proven to be rotated"),
        (plain, halves, 0, "only the keys are proven to be rotated"),
        (halves, faster, 0, "queries and keys are rotated differently"),
        (halves, neighbours, 0, "queries and keys are rotated differently"),
        (wrong_sign, wrong_sign, 0, "not rotated"),
        (halves, halves, 3, "not rotated"),  # the cache counts from 0
    ],
)
def test_what_is_not_proven_stays(q: Any, k: Any, start: int, reason: str) -> None:
    made, rope = paginate(model(q, k, start))
    assert rope == reason
    assert "kv_cache_create_rope" not in made["create_kv_cache"].script()
    rotated = q is not plain or k is not plain
    assert ("R.cos" in made["decode"].script()) == rotated


def test_it_can_be_left_to_the_graph() -> None:
    made, rope = paginate(model(halves, halves), fuse_rope=False)
    assert rope == "not asked for"
    assert "R.cos" in made["decode"].script()
