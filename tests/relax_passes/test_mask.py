"""Masks are proven from index arithmetic, however it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from graphs import SEQ, Graph, build, indices, masked, qkv, scores, tensor
from tvm import relax

from relax_passes.recognize import find_sites


def mask_of(keep: Callable[[Graph, relax.Var, relax.Var], Any]) -> Any:
    """The mask of an attention whose keys are kept where ``keep(g, query, key)`` holds."""

    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        x = masked(g, scores(g, q, k), keep(g, *indices(g)))
        return g.matmul(g.softmax(x), v)

    (site,) = find_sites(build(body, *qkv()))
    return site


def number(value: int) -> relax.Expr:
    return relax.const(value, "int64")


FORMS = {
    "key <= query": (lambda g, q, t: g.less_equal(t, q), "causal"),
    "query >= key": (lambda g, q, t: g.greater_equal(q, t), "causal"),
    "key - query <= 0": (lambda g, q, t: g.less_equal(g.subtract(t, q), number(0)), "causal"),
    "not key > query": (lambda g, q, t: g.logical_not(g.greater(t, q)), "causal"),
    "key < query + 1": (lambda g, q, t: g.less(t, g.add(q, number(1))), "causal"),
    "as 0/1 integers": (
        lambda g, q, t: g.astype(
            g.bitwise_and(relax.const(1, "int64"), g.astype(g.less_equal(t, q), "int64")),
            "bool",
        ),
        "causal",
    ),
    "always true": (lambda g, q, t: g.greater_equal(g.add(t, q), number(0)), "none"),
    "window": (
        lambda g, q, t: g.logical_and(g.less_equal(t, q), g.greater(t, g.subtract(q, number(16)))),
        "causal+window(16)",
    ),
    "strictly before": (lambda g, q, t: g.less(t, q), "t <= q-1"),
    "after": (lambda g, q, t: g.greater_equal(t, q), "q+0 <= t"),
}


@pytest.mark.parametrize("name", FORMS)
def test_index_arithmetic(name: str) -> None:
    keep, expected = FORMS[name]
    site = mask_of(keep)
    assert site.recognised, site.reason
    assert site.mask.describe() == expected


def test_window_counts_the_query_itself() -> None:
    assert mask_of(FORMS["window"][0]).mask.window == 16


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        (lambda g, q, t: g.less_equal(g.multiply(t, number(2)), q), "predicate"),
        (lambda g, q, t: g.logical_or(g.less_equal(t, q), g.less(t, number(3))), "prefix-lm"),
        (lambda g, q, t: g.equal(g.floor_mod(t, number(2)), number(0)), "predicate"),
    ],
    ids=["stretched", "prefix", "every other"],
)
def test_other_arithmetic_is_a_predicate(keep: Any, name: str) -> None:
    site = mask_of(keep)
    assert site.recognised, site.reason
    assert site.mask.describe() == name
    assert not site.mask.causal and len(site.mask.rest) == 1


def test_padding_by_key() -> None:
    padding = tensor("attention_mask", 1, SEQ, dtype="bool")

    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var, keep: relax.Var) -> relax.Var:
        query, key = indices(g)
        both = g.logical_and(g.less_equal(key, query), g.reshape(keep, [1, 1, 1, SEQ]))
        return g.matmul(g.softmax(masked(g, scores(g, q, k), both)), v)

    (site,) = find_sites(build(body, *qkv(), padding))
    assert site.recognised, site.reason
    assert site.mask.describe() == "causal+padding"
    assert [t.name for t in site.mask.padding] == ["attention_mask"]


def test_mask_by_query_is_no_padding() -> None:
    rows = tensor("rows", 1, 1, SEQ, 1, dtype="bool")

    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var, keep: relax.Var) -> relax.Var:
        return g.matmul(g.softmax(masked(g, scores(g, q, k), keep)), v)

    (site,) = find_sites(build(body, *qkv(), rows))
    assert site.recognised, site.reason
    assert (site.mask.describe(), site.mask.padding) == ("mask tensor", [])
