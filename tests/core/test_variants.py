"""Variants written in Python: the shipped ones, and what users may write, against a float64 oracle.

The oracle evaluates each variant's definition in NumPy, written here a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tvm_flashinfer import variant as v
from tvm_flashinfer import variants
from tvm_flashinfer.attention import BatchAttention
from tvm_flashinfer.layout import BlockSparseLayout

HEADS, KV_HEADS, DIM = 6, 2, 32
Q_LEN, KV_LEN = (40, 1, 3), (70, 33, 3)
MAX_LEN = max(KV_LEN)


class Grid:
    """Index arrays of one request, broadcastable to [head, query, key]."""

    def __init__(self, request: int) -> None:
        q, kv = Q_LEN[request], KV_LEN[request]
        self.request = request
        self.head = np.arange(HEADS)[:, None, None]
        self.q = (kv - q + np.arange(q))[None, :, None]
        self.k = np.arange(kv)[None, None, :]


Reference = Callable[[Grid, np.ndarray, dict[str, Any]], tuple[np.ndarray, Any]]


def _causal(g: Grid) -> np.ndarray:
    return g.k <= g.q


REFERENCES: dict[str, tuple[Reference, Callable[[np.random.Generator], dict[str, Any]]]] = {
    "sliding_window": (
        lambda g, x, p: (x, _causal(g) & (g.k >= g.q - p["window_left"])),
        lambda r: {"window_left": 9},
    ),
    "local_window": (
        lambda g, x, p: (x, np.abs(g.k - g.q) <= p["window"]),
        lambda r: {"window": 5},
    ),
    "streaming": (
        lambda g, x, p: (
            x,
            _causal(g) & ((g.k >= g.q - p["window_left"]) | (g.k < p["sink"])),
        ),
        lambda r: {"window_left": 7, "sink": 3},
    ),
    "soft_cap_window": (
        lambda g, x, p: (
            p["cap"] * np.tanh(x / p["cap"]),
            _causal(g) & (g.k >= g.q - p["window_left"]),
        ),
        lambda r: {"window_left": 20, "cap": 1.5},
    ),
    "alibi": (
        lambda g, x, p: (x + p["slope"][g.head] * (g.k - g.q), _causal(g)),
        lambda r: {"slope": r.random(HEADS, dtype=np.float32)},
    ),
    "bias": (
        lambda g, x, p: (x + p["bias"][g.request, g.head, g.q, g.k], True),
        lambda r: {
            "bias": r.standard_normal((len(Q_LEN), HEADS, MAX_LEN, MAX_LEN), dtype=np.float32)
        },
    ),
    "custom_mask": (
        lambda g, x, p: (x, p["visible"][g.request, g.q, g.k]),
        lambda r: {"visible": r.random((len(Q_LEN), MAX_LEN, MAX_LEN)) < 0.3},
    ),
    "prefix_lm": (
        lambda g, x, p: (x, _causal(g) | (g.k < p["prefix"][g.request])),
        lambda r: {"prefix": np.array([50, 0, 2], np.int32)},
    ),
    "packed_documents": (
        lambda g, x, p: (
            x,
            _causal(g) & (p["document"][g.request, g.q] == p["document"][g.request, g.k]),
        ),
        lambda r: {"document": np.sort(r.integers(0, 4, (len(Q_LEN), MAX_LEN)), 1).astype("i4")},
    ),
    "head_scale": (
        lambda g, x, p: (x * p["scale"][g.head], _causal(g)),
        lambda r: {"scale": r.random(HEADS, dtype=np.float32) * 3},
    ),
}


def _gated(at: v.ElementAt, x: Any, p: Any) -> Any:
    from tvm import tirx

    distance = (at.q_idx - at.kv_idx).astype("float32")
    return tirx.tanh(x * p.gate[at.q_head]) * p.scale[at.q_head] - tirx.sqrt(
        tirx.Select(distance > 0.0, distance, tirx.const(0.0, "float32"))
    )


#: Not one of ours: a gate with learned scales and a decay with distance, in blocks of four.
USER_VARIANT = v.Variant(
    "gated_decay",
    params={"gate": v.Tensor(), "scale": v.Tensor()},
    logits=_gated,
    mask=lambda at, p: (at.kv_idx // 4) <= (at.q_idx // 4),
)


def _operands(seed: int) -> tuple[BlockSparseLayout, np.ndarray, np.ndarray, np.ndarray]:
    r = np.random.default_rng(seed)
    layout = BlockSparseLayout.ragged(
        np.cumsum([0, *Q_LEN], dtype=np.int32), np.cumsum([0, *KV_LEN], dtype=np.int32)
    )
    q = r.standard_normal((sum(Q_LEN), HEADS, DIM), dtype=np.float32)
    k, w = (r.standard_normal((sum(KV_LEN), KV_HEADS, DIM), dtype=np.float32) for _ in "kv")
    return layout, q, k, w


def _oracle(
    reference: Reference, q: np.ndarray, k: np.ndarray, w: np.ndarray, params: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    outs, lses = [], []
    q_at = kv_at = 0
    for request, (nq, nk) in enumerate(zip(Q_LEN, KV_LEN, strict=True)):
        group = HEADS // KV_HEADS
        qs = q[q_at : q_at + nq].astype(np.float64)
        ks, vs = (np.repeat(x[kv_at : kv_at + nk].astype(np.float64), group, 1) for x in (k, w))
        logits, visible = reference(
            Grid(request), np.einsum("qhd,khd->hqk", qs, ks) * DIM**-0.5, params
        )
        logits = np.where(visible, logits, -np.inf)
        top = np.max(logits, -1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
        total = weights.sum(-1, keepdims=True)
        probabilities = weights / np.where(total > 0, total, 1)
        outs.append(np.einsum("hqk,khd->qhd", probabilities, vs))
        with np.errstate(divide="ignore"):
            lses.append((np.log(total) + np.where(np.isfinite(top), top, 0))[..., 0].T)
        q_at, kv_at = q_at + nq, kv_at + nk
    return np.concatenate(outs), np.concatenate(lses)


def _check(variant: v.Variant, reference: Reference, params: dict[str, Any]) -> None:
    layout, q, k, w = _operands(3)
    step = BatchAttention(
        HEADS,
        KV_HEADS,
        DIM,
        variant=variant,
        max_requests=len(Q_LEN),
        max_q_tokens=len(q),
        max_kv_pages=len(k),
    )
    step.plan(layout)
    out, lse = step.run(q, k, w, params=params, return_lse=True)
    want, want_lse = _oracle(reference, q, k, w, params)
    assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[seen], want_lse[seen], rtol=1e-5, atol=1e-5)
    assert not np.any(out[~seen])


@pytest.mark.parametrize("name", ["soft_cap_window", "alibi", "custom_mask"])
def test_shipped_variant(name: str) -> None:
    reference, params = REFERENCES[name]
    _check(variants.SHIPPED[name], reference, params(np.random.default_rng(11)))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", sorted(set(REFERENCES) - {"soft_cap_window", "alibi", "custom_mask"})
)
def test_every_shipped_variant(name: str) -> None:
    reference, params = REFERENCES[name]
    _check(variants.SHIPPED[name], reference, params(np.random.default_rng(12)))


def test_a_users_variant() -> None:
    r = np.random.default_rng(5)
    params = {name: r.random(HEADS, dtype=np.float32) for name in ("gate", "scale")}

    def reference(g: Grid, x: np.ndarray, p: dict[str, Any]) -> tuple[np.ndarray, Any]:
        decay = np.sqrt(np.maximum(g.q - g.k, 0))
        return np.tanh(x * p["gate"][g.head]) * p["scale"][g.head] - decay, g.k // 4 <= g.q // 4

    _check(USER_VARIANT, reference, params)


def test_causality_is_proven_from_the_mask() -> None:
    proven = {name for name, variant in variants.SHIPPED.items() if variant.causal}
    assert proven == {
        "causal",
        "sliding_window",
        "streaming",
        "soft_cap",
        "soft_cap_window",
        "alibi",
        "packed_documents",
        "head_scale",
        "learned_sink",
        "learned_sink_window",
        "sigmoid",
        "gated",
    }
    assert not USER_VARIANT.causal


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: v.Variant("Bad Name"), "name is 'Bad Name'"),
        (lambda: v.Variant("x", params={"p": 3}), "parameter p is a int"),  # type: ignore[dict-item]
        (lambda: v.Scalar("float64"), "dtype of a scalar is 'float64'"),
        (lambda: v.Tensor(ndim=5), "ndim of a tensor is 5"),
        (lambda: v.Variant("x", mask=lambda at, p: at.q_idx).cpp, "mask returns int32"),
        (
            lambda: (
                v.Variant("x", params={"t": v.Tensor(ndim=2)}, logits=lambda at, x, p: p.t[0]).cpp
            ),
            "parameter t has 2 axes, it was indexed with 1",
        ),
        (
            lambda: (
                v.Variant("x", logits=lambda at, x, p: x.astype("float64").astype("float32")).cpp
            ),
            "logits uses dtype float64",
        ),
    ],
)
def test_a_bad_variant_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(v.VariantError, match=message):
        make()


def test_bad_parameters_are_named() -> None:
    layout, q, k, w = _operands(4)
    step = BatchAttention(
        HEADS,
        KV_HEADS,
        DIM,
        variant=variants.alibi,
        max_requests=len(Q_LEN),
        max_q_tokens=len(q),
        max_kv_pages=len(k),
    )
    step.plan(layout)
    out = np.full_like(q, 7)
    slope = np.ones(HEADS, np.float32)
    cases: list[tuple[dict[str, Any] | None, type[Exception], str]] = [
        (None, ValueError, "parameters are not set: it declares 1, the first is `slope`"),
        ({}, ValueError, "lacks 'slope'"),
        ({"slop": slope}, ValueError, "has 'slop', the variant declares slope"),
        ({"slope": slope[None]}, ValueError, "`slope` has shape .1, 6., expected 1 axes"),
        ({"slope": slope.astype("f8")}, TypeError, "`slope` has dtype float64"),
        ({"slope": slope[:5]}, ValueError, "`slope` has shape .5., too small"),
    ]
    for params, error, message in cases:
        with pytest.raises(error, match=message):
            step.run(q, k, w, params=params, out=out)
        assert np.all(out == 7)
    step.run(q, k, w, params={"slope": slope}, out=out)
    assert not np.any(out == 7)
