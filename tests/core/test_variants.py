"""Variants written in Python: the shipped ones, and what users may write, against a float64 oracle.

The oracle evaluates each variant's definition in NumPy, written here a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from batches import PagedBatch
from variant_checks import check_definition
from variant_definitions import DEFINITIONS, Definition, Grid, Params

from tvm_flashinfer import variant as v
from tvm_flashinfer import variants
from tvm_flashinfer.attention import BatchAttention

#: Several tiles, a decode, one key, nothing to see, nothing to ask, a rest of every size.
PAIRS = [(40, 97), (1, 300), (1, 1), (3, 0), (0, 17), (17, 54)]
QUICK = {"soft_cap_window", "alibi", "custom_mask"}
#: (page size, KV heads, group, head dim), each seen by some dtype of every variant.
SHAPES = [(1, 4, 1, 32), (5, 1, 3, 64), (16, 4, 7, 80), (64, 1, 8, 128), (16, 2, 3, 256)]
DTYPES = ["float32", "float16", "bfloat16"]


def test_every_shipped_variant_is_defined_here() -> None:
    assert set(DEFINITIONS) == set(variants.SHIPPED)


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


def _check(
    variant: v.Variant,
    definition: Definition,
    params: Params | None = None,
    *,
    shape: tuple[int, int, int, int] = (5, 2, 3, 32),
    dtype: str = "float32",
    num_workers: int = 0,
) -> None:
    page_size, kv_heads, group, dim = shape
    batch = PagedBatch(PAIRS, page_size, (kv_heads * group, kv_heads), (dim, dim), dtype, seed=dim)

    def make(batch: PagedBatch) -> BatchAttention:
        return BatchAttention(
            *batch.heads,
            dim,
            dtype=dtype,
            variant=variant,
            max_requests=len(PAIRS),
            max_q_tokens=len(batch.q),
            max_kv_pages=batch.layout.num_pages,
            num_workers=num_workers,
        )

    check_definition(make, batch, definition, params)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_shipped_variant(name: str) -> None:
    _check(variants.SHIPPED[name], DEFINITIONS[name])


@pytest.mark.heavy
@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_every_variant_and_dtype(name: str, dtype: str, turn: int) -> None:
    """Every shape is met by each variant: two by every dtype, in turn."""
    at = sorted(DEFINITIONS).index(name) + 2 * DTYPES.index(dtype) + turn
    _check(
        variants.SHIPPED[name],
        DEFINITIONS[name],
        shape=SHAPES[at % len(SHAPES)],
        dtype=dtype,
        num_workers=(1, 7, 64)[at % 3],
    )


def test_a_users_variant() -> None:
    r = np.random.default_rng(5)
    params = {name: r.random(6, dtype=np.float32) for name in ("gate", "scale")}

    def logits(g: Grid, x: np.ndarray, p: Params) -> np.ndarray:
        decay = np.sqrt(np.maximum(g.q - g.k, 0))
        return np.tanh(x * p["gate"][g.head]) * p["scale"][g.head] - decay

    blocks = Definition(lambda g, p: g.k // 4 <= g.q // 4, logits=logits)
    _check(USER_VARIANT, blocks, params)


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
    batch = PagedBatch(PAIRS, 16, (6, 2), (32, 32))
    q, k, w = (x.numpy() for x in batch.tensors())
    step = BatchAttention(
        6,
        2,
        32,
        variant=variants.alibi,
        max_requests=len(PAIRS),
        max_q_tokens=len(q),
        max_kv_pages=batch.layout.num_pages,
    )
    step.plan(batch.layout)
    out = np.full_like(q, 7)
    slope = np.ones(6, np.float32)
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
