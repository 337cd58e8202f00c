"""What every shipped variant means, written a second time: float64 NumPy over whole matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_flashinfer import variants
from tvm_flashinfer.variant import Tensor, Variant

Params = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of the batch that parameters are made for."""

    requests: int
    tokens: int  # queries of all requests
    heads: int
    max_len: int  # keys of the longest request
    dim_vo: int


class Grid:
    """Index arrays of one request, broadcastable to [head, query, key].

    Queries are bottom-right aligned; those before the first key are clipped to it, as a mask
    tensor has no rows for them (see :func:`attend`).
    """

    def __init__(self, request: int, first_row: int, queries: int, keys: int, heads: int) -> None:
        self.request = request
        self.rows = np.arange(first_row, first_row + queries)
        self.head = np.arange(heads)[:, None, None]
        self.q = np.maximum(keys - queries + np.arange(queries), 0)[None, :, None]
        self.k = np.arange(keys)[None, None, :]

    @property
    def causal(self) -> np.ndarray:
        return self.k <= self.q


def _no_params(r: np.random.Generator, s: Sizes) -> Params:
    return {}


@dataclass(frozen=True)
class Definition:
    """``visible(grid, params)``, ``logits(grid, x, params)`` and so on; left out means plain."""

    visible: Callable[[Grid, Params], Any] = lambda g, p: True
    params: Callable[[np.random.Generator, Sizes], Params] = _no_params
    logits: Callable[[Grid, np.ndarray, Params], np.ndarray] = lambda g, x, p: x
    sink: Callable[[Grid, Params], np.ndarray] | None = None  # [head]
    output: Callable[[Grid, np.ndarray, Params], np.ndarray] = lambda g, o, p: o
    softmax: bool = True


def _causal(g: Grid, p: Params) -> np.ndarray:
    return g.causal


def _window(g: Grid, p: Params) -> np.ndarray:
    return g.causal & (g.k >= g.q - p["window_left"])


def _capped(g: Grid, x: np.ndarray, p: Params) -> np.ndarray:
    return p["cap"] * np.tanh(x / p["cap"])


def _bits(r: np.random.Generator, s: Sizes) -> Params:
    keys = -(-s.max_len // 8) * 8
    visible = r.random((s.requests, s.max_len, keys)) < 0.3
    return {"bits": np.packbits(visible, axis=-1, bitorder="little")}


DEFINITIONS: dict[str, Definition] = {
    "full": Definition(),
    "causal": Definition(_causal),
    "sliding_window": Definition(_window, lambda r, s: {"window_left": 9}),
    "local_window": Definition(
        lambda g, p: np.abs(g.k - g.q) <= p["window"], lambda r, s: {"window": 5}
    ),
    "streaming": Definition(
        lambda g, p: g.causal & ((g.k >= g.q - p["window_left"]) | (g.k < p["sink"])),
        lambda r, s: {"window_left": 7, "sink": 3},
    ),
    "soft_cap": Definition(_causal, lambda r, s: {"cap": 1.5}, _capped),
    "soft_cap_window": Definition(_window, lambda r, s: {"window_left": 20, "cap": 1.5}, _capped),
    "alibi": Definition(
        _causal,
        lambda r, s: {"slope": r.random(s.heads, dtype=np.float32)},
        lambda g, x, p: x + p["slope"][g.head] * (g.k - g.q),
    ),
    "bias": Definition(
        params=lambda r, s: {
            "bias": r.standard_normal((s.requests, s.heads, s.max_len, s.max_len), dtype=np.float32)
        },
        logits=lambda g, x, p: x + p["bias"][g.request, g.head, g.q, g.k],
    ),
    "custom_mask": Definition(
        lambda g, p: p["visible"][g.request, g.q, g.k],
        lambda r, s: {"visible": r.random((s.requests, s.max_len, s.max_len)) < 0.3},
    ),
    "prefix_lm": Definition(
        lambda g, p: g.causal | (g.k < p["prefix"][g.request]),
        lambda r, s: {"prefix": r.integers(0, s.max_len, s.requests, np.int32)},
    ),
    "packed_documents": Definition(
        lambda g, p: g.causal & (p["document"][g.request, g.q] == p["document"][g.request, g.k]),
        lambda r, s: {
            "document": np.sort(r.integers(0, 4, (s.requests, s.max_len), np.int32), axis=1)
        },
    ),
    "head_scale": Definition(
        _causal,
        lambda r, s: {"scale": r.random(s.heads, dtype=np.float32) * 3},
        lambda g, x, p: x * p["scale"][g.head],
    ),
    "packed_mask": Definition(
        lambda g, p: np.unpackbits(p["bits"], axis=-1, bitorder="little")[g.request, g.q, g.k] > 0,
        _bits,
    ),
    "learned_sink": Definition(
        _causal,
        lambda r, s: {"sink": r.standard_normal(s.heads, dtype=np.float32) * 3},
        sink=lambda g, p: p["sink"],
    ),
    "learned_sink_window": Definition(
        _window,
        lambda r, s: {
            "sink": r.standard_normal(s.heads, dtype=np.float32) * 3,
            "window_left": 11,
        },
        sink=lambda g, p: p["sink"],
    ),
    "sigmoid": Definition(
        _causal,
        lambda r, s: {"bias": -1.5},
        lambda g, x, p: 1 / (1 + np.exp(-(x + p["bias"]))),
        softmax=False,
    ),
    "gated": Definition(
        _causal,
        lambda r, s: {"gate": r.standard_normal((s.tokens, s.heads, s.dim_vo), dtype=np.float32)},
        output=lambda g, o, p: o / (1 + np.exp(-p["gate"][g.rows].astype(np.float64))),
    ),
}


def attend(
    definition: Definition, g: Grid, q: np.ndarray, k: np.ndarray, v: np.ndarray, params: Params
) -> tuple[np.ndarray, np.ndarray]:
    """Output ``[queries, heads, dim]`` and LSE ``[queries, heads]`` of one request, float64.

    Parameters
    ----------
    q, k, v : [tokens, heads or KV heads, dim]
        Of the request; query head ``h`` reads KV head ``h // group``.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    x = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) * q.shape[-1] ** -0.5
    x = definition.logits(g, x, params)
    visible = np.broadcast_to(definition.visible(g, params), x.shape)
    if not definition.softmax:
        return np.einsum("hqk,khd->qhd", np.where(visible, x, 0), v), np.empty(0)
    x = np.where(visible, x, -np.inf)
    sink = np.full(len(x), -np.inf) if definition.sink is None else definition.sink(g, params)
    peak = np.maximum(x.max(-1, initial=-np.inf), sink[:, None])
    base = np.where(np.isfinite(peak), peak, 0)[..., None]
    weights = np.exp(x - base)
    total = weights.sum(-1) + np.exp(sink[:, None] - base[..., 0])
    weights /= np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        lse = np.log(total) + base[..., 0]
    return definition.output(g, np.einsum("hqk,khd->qhd", weights, v), params), lse.T


#: Element-wise and vector-wise functions of everything that a position says.
EVERYTHING = Variant(
    "everything",
    params={"a": Tensor(ndim=2), "b": Tensor(ndim=1), "c": Tensor("float16", ndim=1)},
    query=lambda at, x, p: x[at.dim] * p.a[at.q_head, at.dim] + x[0] * p.c[at.batch],
    key=lambda at, x, p: x[at.dim] + x[at.dim + 1] * p.b[at.kv_idx] + p.a[at.kv_head, at.dim],
    value=lambda at, x, p: x[at.dim] * p.b[at.kv_idx] - x[3],
    output=lambda at, x, p: x[at.dim ^ 1] * p.a[at.q_head, at.dim] + p.b[at.row],
    mask=variants.causal.mask,
)
