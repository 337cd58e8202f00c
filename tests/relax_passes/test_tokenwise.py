"""PaginateAttention proves that nothing but attention mixes tokens, or refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tvm
from graphs import DIM, HEADS, Graph, build, causal_attention, indices, masked, scores, tensor
from tvm import relax, tirx

from relax_passes.paginate import PaginateAttention, PaginateError
from relax_passes.report import Report
from tvm_flashinfer.jit import KernelArtifact

WIDTH, VOCAB = HEADS * DIM, 16


def model(
    inner: Callable[[Graph, relax.Var], Any] = lambda g, x: x,
    attention: Callable[..., Any] = causal_attention,
    length: Any = None,
    positions: Callable[[Graph, Any], Any] | None = None,
) -> tvm.IRModule:
    """A one-layer language model; ``inner`` is applied to the embedded tokens [1, S, WIDTH]."""
    seq = tirx.Var("seq_len", "int64") if length is None else length
    ids = tensor("input_ids", 1, seq, dtype="int64")
    table = tensor("table", VOCAB, WIDTH)

    def body(g: Graph, ids: relax.Var, table: relax.Var) -> relax.Var:
        flat = g.reshape(g.astype(ids, "int32"), [seq])
        x = g.reshape(g.take(table, flat, axis=0), [1, seq, WIDTH])
        if positions is not None:
            x = g.add(x, positions(g, seq))
        x = inner(g, x)
        heads = g.permute_dims(g.reshape(x, [1, seq, HEADS, DIM]), [0, 2, 1, 3])
        out = g.permute_dims(attention(g, heads, heads, heads), [0, 2, 1, 3])
        hidden = g.add(x, g.reshape(out, [1, seq, WIDTH]))
        return g.matmul(hidden, g.permute_dims(table))

    return tvm.IRModule({"main": build(body, ids, table, num_input=1)})


def paginate(module: tvm.IRModule, **options: Any) -> tvm.IRModule:
    return PaginateAttention(build=lambda _: KernelArtifact("", "", "kernel"), **options)(module)


def positions_as_floats(g: Graph, seq: Any) -> relax.Var:
    return g.reshape(g.astype(g.arange(0, seq, 1, "int64"), "float32"), [1, seq, 1])


ACCEPTED: dict[str, Callable[[Graph, Any], Any]] = {
    "nothing": lambda g, x: x,
    "softmax over the width": lambda g, x: g.softmax(x),
    "mean over the width": lambda g, x: g.subtract(x, g.mean(x, -1, True)),
    "top halves swapped": lambda g, x: g.concat(list(g.split(x, 2, -1)), -1),
    "cumsum over the width": lambda g, x: g.add(
        x, g.matmul(x, relax.const([[1.0] * WIDTH] * WIDTH, "float32"))
    ),
}
ACCEPTED.pop("top halves swapped")

REFUSED: dict[str, tuple[Callable[[Graph, Any], Any], str]] = {
    "cumsum over the tokens": (lambda g, x: g.cumsum(x, axis=1), "'cumsum'"),
    "mean over the tokens": (lambda g, x: g.subtract(x, g.mean(x, 1, True)), "'mean'"),
    "softmax over the tokens": (lambda g, x: g.softmax(x, axis=1), "'nn.softmax'"),
    "tokens reversed": (lambda g, x: g.flip(x, 1), "'flip'"),
    "tokens multiplied with tokens": (
        lambda g, x: g.matmul(g.matmul(x, g.permute_dims(x, [0, 2, 1])), x),
        "'matmul'",
    ),
    "tokens merged with the width": (
        lambda g, x: g.reshape(g.reshape(x, [x.ty.shape[1] * WIDTH]), x.ty.shape),
        "'reshape'",
    ),
    "one token shown to all": (
        lambda g, x: g.add(x, g.strided_slice(x, [1], [0], [1])),
        "'strided_slice'",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    module = paginate(model(ACCEPTED[name]))
    names = {gv.name_hint for gv in module.functions}
    assert names >= {"prefill", "decode", "batch_prefill", "batch_decode", "create_kv_cache"}
    assert "main" not in names


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    inner, expected = REFUSED[name]
    with pytest.raises(PaginateError, match=expected):
        paginate(model(inner))


def test_positions_come_from_the_cache() -> None:
    text = paginate(model(positions=positions_as_floats))["decode"].script()
    assert "tvm_flashinfer.kv_cache_query_positions" in text
    assert "arange" not in text


def test_length_used_as_a_number() -> None:
    def body(g: Graph, seq: Any) -> Any:
        return g.reshape(g.astype(g.arange(0, seq + seq, 2, "int64"), "float32"), [1, seq, 1])

    with pytest.raises(PaginateError, match="'arange'"):
        paginate(model(positions=body))


def test_not_causal() -> None:
    def encoder(g: Graph, q: Any, k: Any, v: Any) -> Any:
        return g.matmul(g.softmax(scores(g, q, k)), v)

    report = Report()
    with pytest.raises(PaginateError, match="not proven causal"):
        paginate(model(attention=encoder), report=report)
    (site,) = report.sites
    assert not site.rewritten
    assert "not proven causal" in site.reason


def window_attention(g: Graph, q: Any, k: Any, v: Any) -> Any:
    query, key = indices(g, q.ty.shape[2])
    after = g.greater(key, g.subtract(query, relax.const(32, "int64")))
    keep = g.logical_and(g.less_equal(key, query), after)
    return g.matmul(g.softmax(masked(g, scores(g, q, k), keep)), v)


def test_a_window_is_the_caches_unless_no_sequence_is_longer() -> None:
    made = paginate(model(attention=window_attention), max_seq_len=33)["create_kv_cache"].script()
    assert "kv_cache_with_layers" in made
    assert "T.int64(32)" in made or "32" in made.partition("kv_cache_with_layers")[2]
    plain = paginate(model(attention=window_attention), max_seq_len=32)["create_kv_cache"]
    assert "kv_cache_with_layers" not in plain.script()


def test_fixed_length() -> None:
    with pytest.raises(PaginateError, match="dynamic sequence length"):
        paginate(model(length=8))


def test_no_attention() -> None:
    with pytest.raises(PaginateError, match="no attention"):
        paginate(model(attention=lambda g, q, k, v: v))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'ours' and 'tir'"):
        PaginateAttention("theirs")


def test_a_past_among_the_inputs_is_the_caches() -> None:
    """As exported with past keys and values: what is new is appended to them."""
    seq, past = tirx.Var("seq_len", "int64"), tirx.Var("past_len", "int64")
    ids, table = tensor("input_ids", 1, seq, dtype="int64"), tensor("table", VOCAB, WIDTH)
    kv = [tensor(name, 1, HEADS, past, DIM) for name in ("past_k", "past_v")]

    def body(g: Graph, ids: Any, past_k: Any, past_v: Any, table: Any) -> Any:
        flat = g.reshape(g.astype(ids, "int32"), [seq])
        x = g.reshape(g.take(table, flat, axis=0), [1, seq, WIDTH])
        new = g.permute_dims(g.reshape(x, [1, seq, HEADS, DIM]), [0, 2, 1, 3])
        k, v = g.concat([past_k, new], 2), g.concat([past_v, new], 2)
        query = g.expand_dims(g.arange(past, past + seq, 1, "int64"), 1)
        key = g.expand_dims(g.arange(0, past + seq, 1, "int64"), 0)
        weights = g.softmax(masked(g, scores(g, new, k), g.less_equal(key, query)))
        out = g.permute_dims(g.matmul(weights, v), [0, 2, 1, 3])
        hidden = g.add(x, g.reshape(out, [1, seq, WIDTH]))
        return g.matmul(hidden, g.permute_dims(table)), k, v

    module = tvm.IRModule({"main": build(body, ids, *kv, table, num_input=3)})
    made, plain = paginate(module), paginate(model())
    for name in ("prefill", "decode", "batch_prefill", "batch_decode", "batch_verify"):
        tvm.ir.assert_structural_equal(made[name], plain[name], map_free_vars=True)
