"""What a variant's keys read, against reading them for every element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tvm import tirx

from tvm_flashinfer import variants
from tvm_flashinfer.key_reach import key_reach
from tvm_flashinfer.variant import Tensor, Variant


def reach(variant: Variant) -> tuple[int, int]:
    return key_reach(variant.traced.expressions["key"], variant.traced.positions["dim"])


def of(key: Callable[..., Any]) -> Variant:
    return Variant(
        "under_test", params={"scale": Tensor(ndim=1), "at": Tensor("int32", ndim=1)}, key=key
    )


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (variants.rope(128), (64, 128)),
        (variants.rope(24), (12, 24)),
        (variants.rope(64, interleaved=True), (1, 64)),
        (variants.rope_table(96), (48, 96)),
        (variants.rope_table(32, interleaved=True), (1, 32)),
        (variants.quantized("channel"), (0, 0)),
        (variants.quantized("token", base=variants.rope(32)), (16, 32)),
    ],
    ids=lambda x: x.name if isinstance(x, Variant) else None,
)
def test_shipped(variant: Variant, expected: tuple[int, int]) -> None:
    assert reach(variant) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (lambda at, x, p: x[at.dim] * p.scale[at.dim], (0, 0)),
        (lambda at, x, p: p.scale[at.dim], (0, 0)),  # reads none at all
        (lambda at, x, p: x[at.dim] + x[at.dim ^ 8], (8, 576)),
        (lambda at, x, p: tirx.Select(at.dim < 16, x[at.dim ^ 4], x[at.dim]), (4, 16)),
        (lambda at, x, p: tirx.if_then_else(at.dim % 8 < 4, x[at.dim + 4], x[at.dim]), (4, 576)),
        # An element of a block's first half alone reads its partner: a pair all the same.
        (lambda at, x, p: tirx.Select(at.dim < 8, x[at.dim + 8], x[at.dim]), (8, 16)),
        (lambda at, x, p: x[0], (-1, 0)),
        (lambda at, x, p: x[at.dim + 1], (-1, 0)),
        (lambda at, x, p: x[at.dim ^ 1] + x[at.dim ^ 2], (-1, 0)),
        (lambda at, x, p: x[p.at[at.dim]], (-1, 0)),  # not known what
        (lambda at, x, p: x[at.dim ^ (at.kv_idx % 2)], (-1, 0)),
        # The index of what isn't chosen doesn't matter, unless it isn't known whether it is.
        (lambda at, x, p: tirx.Select(at.dim < 576, x[at.dim], x[0]), (0, 0)),
        (lambda at, x, p: tirx.Select(at.kv_idx < 9, x[at.dim], x[0]), (-1, 0)),
    ],
)  # fmt: skip
def test_users(key: Callable[..., Any], expected: tuple[int, int]) -> None:
    assert reach(of(key)) == expected
