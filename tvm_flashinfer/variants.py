"""The variants that ship: each a few lines of the interface of ``variant.py``, none special.

Variants that need numbers when they are compiled are made by functions: :func:`rope`,
:func:`rope_table`, :func:`quantized`. Others are values, listed in :data:`SHIPPED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .variant import ElementAt, Expr, Scalar, Tensor, Variant


def _all(*terms: Expr) -> Expr:
    from tvm import tirx

    return tirx.all(*terms)


def _any(*terms: Expr) -> Expr:
    from tvm import tirx

    return tirx.any(*terms)


full = Variant("full")

causal = Variant("causal", mask=lambda at, p: at.kv_idx <= at.q_idx)


def _sliding_window(at: ElementAt, p: Any) -> Expr:
    return _all(at.kv_idx <= at.q_idx, at.kv_idx >= at.q_idx - p.window_left)


def _streaming(at: ElementAt, p: Any) -> Expr:
    recent = at.kv_idx >= at.q_idx - p.window_left
    return _all(at.kv_idx <= at.q_idx, _any(recent, at.kv_idx < p.sink))


def _soft_cap(at: ElementAt, x: Expr, p: Any) -> Expr:
    from tvm import tirx

    return tirx.tanh(x / p.cap) * p.cap


#: A query sees itself and ``window_left`` keys before.
sliding_window = Variant(
    "sliding_window", params={"window_left": Scalar("int32")}, mask=_sliding_window
)

#: Keys within ``window`` positions on either side (encoders).
local_window = Variant(
    "local_window",
    params={"window": Scalar("int32")},
    mask=lambda at, p: _all(at.kv_idx >= at.q_idx - p.window, at.kv_idx <= at.q_idx + p.window),
)

#: StreamingLLM: a sliding window, and the first ``sink`` keys always.
streaming = Variant(
    "streaming",
    params={"window_left": Scalar("int32"), "sink": Scalar("int32")},
    mask=_streaming,
)

#: Gemma 2: causal, logits become ``cap * tanh(x / cap)``.
soft_cap = Variant("soft_cap", params={"cap": Scalar()}, logits=_soft_cap, mask=causal.mask)

#: Soft-cap and sliding window together (Gemma 2's local layers).
soft_cap_window = Variant(
    "soft_cap_window",
    params={"window_left": Scalar("int32"), "cap": Scalar()},
    logits=_soft_cap,
    mask=_sliding_window,
)


def windowed(base: Variant | None = None) -> Variant:
    """``base`` (plain causal attention unless given), of which a query sees a window only.

    Its first parameter is ``window_left``, the tokens that a query sees before itself.
    """
    if base is None:
        return sliding_window

    def mask(at: ElementAt, p: Any) -> Expr:
        inside = _sliding_window(at, p)
        return inside if base.mask is None else _all(inside, base.mask(at, p))

    made = base.extended(f"{base.name}_windowed", mask=mask)
    return replace(made, params={"window_left": Scalar("int32"), **made.params})


#: ALiBi (Press et al., 2022), with a slope per query head.
alibi = Variant(
    "alibi",
    params={"slope": Tensor(ndim=1)},
    logits=lambda at, x, p: x + p.slope[at.q_head] * (at.kv_idx - at.q_idx).astype("float32"),
    mask=causal.mask,
)

#: Additive bias ``[batch, query head, query, key]``.
bias = Variant(
    "bias",
    params={"bias": Tensor(ndim=4)},
    logits=lambda at, x, p: x + p.bias[at.batch, at.q_head, at.q_idx, at.kv_idx],
)

#: Boolean mask ``[batch, query, key]``; true is visible.
custom_mask = Variant(
    "custom_mask",
    params={"visible": Tensor("bool", ndim=3)},
    mask=lambda at, p: p.visible[at.batch, at.q_idx, at.kv_idx],
)

#: Prefix-LM: the first ``prefix[batch]`` keys are visible to every query, the rest causally.
prefix_lm = Variant(
    "prefix_lm",
    params={"prefix": Tensor("int32", ndim=1)},
    mask=lambda at, p: _any(at.kv_idx <= at.q_idx, at.kv_idx < p.prefix[at.batch]),
)

#: Packed documents: causal within a document, ``document[batch, position]`` its number.
packed_documents = Variant(
    "packed_documents",
    params={"document": Tensor("int32", ndim=2)},
    mask=lambda at, p: _all(
        at.kv_idx <= at.q_idx,
        p.document[at.batch, at.q_idx].equal(p.document[at.batch, at.kv_idx]),
    ),
)

#: A scale per query head (differential attention's two softmaxes use one each).
head_scale = Variant(
    "head_scale",
    params={"scale": Tensor(ndim=1)},
    logits=lambda at, x, p: x * p.scale[at.q_head],
    mask=causal.mask,
)

#: Boolean mask ``[batch, query, key / 8]`` of bits, the first key lowest (``np.packbits`` with
#: ``bitorder="little"``).
packed_mask = Variant(
    "packed_mask",
    params={"bits": Tensor("uint8", ndim=3)},
    mask=lambda at, p: ((p.bits[at.batch, at.q_idx, at.kv_idx // 8] >> (at.kv_idx % 8)) & 1).equal(
        1
    ),
)

#: Learned sinks (gpt-oss): a logit per query head that only takes part in the sum.
learned_sink = Variant(
    "learned_sink",
    params={"sink": Tensor(ndim=1)},
    sink=lambda at, p: p.sink[at.q_head],
    mask=causal.mask,
)

#: Learned sinks under a sliding window (gpt-oss's local layers).
learned_sink_window = learned_sink.extended(
    "learned_sink_window", params={"window_left": Scalar("int32")}, mask=_sliding_window
)


def _sigmoid(at: ElementAt, x: Expr, p: Any) -> Expr:
    from tvm import tirx

    return tirx.sigmoid(x + p.bias)


#: Sigmoid attention (Ramapuram et al., 2024): every key weighs ``sigmoid(x + bias)``.
sigmoid = Variant(
    "sigmoid", params={"bias": Scalar()}, logits=_sigmoid, mask=causal.mask, softmax=False
)


def _gated(at: Any, x: Any, p: Any) -> Expr:
    from tvm import tirx

    return x[at.dim] * tirx.sigmoid(p.gate[at.row, at.q_head, at.dim])


#: Gated attention (Qwen3-Next): outputs times ``sigmoid(gate[token, query head, element])``.
gated = Variant("gated", params={"gate": Tensor(ndim=3)}, output=_gated, mask=causal.mask)

SHIPPED: Mapping[str, Variant] = {
    v.name: v
    for v in (
        full,
        causal,
        sliding_window,
        local_window,
        streaming,
        soft_cap,
        soft_cap_window,
        alibi,
        bias,
        custom_mask,
        prefix_lm,
        packed_documents,
        head_scale,
        packed_mask,
        learned_sink,
        learned_sink_window,
        sigmoid,
        gated,
    )
}


#: Radians of one unit of a ``turn``. A whole turn is 2^32: unsigned products wrap as angles do.
_RADIANS = 2.0 * math.pi / 2.0**32


def rope_turns(frequencies: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """The parameter ``turn`` of :func:`rope`, from radians per position.

    A turn is 2^32 units. Angles computed with them are exact to 8e-10 radians per position, where
    float32 angles are off by 6e-8 of the angle.
    """
    turns = np.rint(np.asarray(frequencies, np.float64) / _RADIANS).astype(np.int64)
    return turns.astype(np.uint32).view(np.int32)


def rope(
    rotary_dim: int, *, interleaved: bool = False, on_store: bool = False, base: Variant = causal
) -> Variant:
    """Rotary embedding in the kernel: queries and keys are rotated by their positions when loaded.

    Parameters
    ----------
    rotary_dim : int
        Elements of a head that are rotated, from the first on; those after pass through.
    interleaved : bool
        Pairs are ``(2i, 2i + 1)``, as in GPT-J; else ``(i, i + rotary_dim / 2)``, as in LLaMA.
    on_store : bool
        Keys are rotated once, on their way into the pool, instead of whenever they are read.
    base : Variant
        What else happens.

    Notes
    -----
    Parameters are ``turn``, ``rope_turns(frequencies)``, and ``magnitude``: every scaling that
    models are published with is a change of those, see ``RopeConfig.resolve``.
    """
    half = rotary_dim // 2

    def rotate(position: Expr, d: Expr, x: Any, p: Any, magnitude: Expr | None) -> Expr:
        from tvm import tirx

        if interleaved:
            first, pair, partner = (d % 2).equal(0), tirx.min(d // 2, half - 1), x[d ^ 1]
        else:
            first = d < half
            pair = tirx.min(tirx.Select(first, d, d - half), half - 1)
            partner = x[tirx.Select(first, d + half, d - half)]
        turned = position.astype("uint32") * p.turn[pair].astype("uint32")
        angle = turned.astype("int32").astype("float32") * _RADIANS
        sine = tirx.sin(angle)
        sine = tirx.Select(first, -1.0 * sine, sine)
        rotated = x[d] * tirx.cos(angle) + partner * sine
        if magnitude is not None:
            rotated = rotated * magnitude
        return tirx.Select(d < rotary_dim, rotated, x[d])

    def query(at: Any, x: Any, p: Any) -> Expr:
        # Keys that are read over and over leave their magnitude to the query.
        both = p.magnitude if on_store else p.magnitude * p.magnitude
        return rotate(at.q_idx, at.dim, x, p, both)

    def key(at: Any, x: Any, p: Any) -> Expr:
        return rotate(at.kv_idx, at.dim, x, p, p.magnitude if on_store else None)

    style = ("gptj" if interleaved else "llama") + ("_stored" if on_store else "")
    return base.extended(
        f"{base.name}_rope{rotary_dim}_{style}",
        params={"turn": Tensor("int32", ndim=1), "magnitude": Scalar()},
        query=query,
        **{"store_key" if on_store else "key": key},
    )


#: The parameter of :func:`rope_table`.
ROPE_TABLE = "rope_table"


def rope_table(
    rotary_dim: int, *, interleaved: bool = False, query: bool = True, base: Variant = causal
) -> Variant:
    """As :func:`rope`, with sines and cosines from a table: three times as fast on a CPU.

    Parameters
    ----------
    rotary_dim, interleaved, base
        As there.
    query : bool
        Whether queries are rotated too; else they come rotated.

    Notes
    -----
    The last parameter is ``rope_table``, float32 ``[positions, 2, rotary_dim]``: what an element is
    multiplied by, and what its partner; :func:`rope_turn_table` makes it of frequencies. A key is
    rotated before ``base`` sees it, unless ``base`` transforms keys when they are stored: what it
    stored it restores first.
    """
    half = rotary_dim // 2

    def rotate(position: Expr, d: Expr, x: Any, p: Any) -> Expr:
        from tvm import tirx

        table = getattr(p, ROPE_TABLE)
        if base.causal:  # a query before the first key sees none
            position = tirx.max(position, 0)
        at = tirx.min(d, rotary_dim - 1)
        partner = x[d ^ 1] if interleaved else x[tirx.Select(d < half, d + half, d - half)]
        rotated = x[d] * table[position, 0, at] + partner * table[position, 1, at]
        return tirx.Select(d < rotary_dim, rotated, x[d])

    def key(at: Any, x: Any, p: Any) -> Expr:
        inner = base.key
        if inner is None:
            return rotate(at.kv_idx, at.dim, x, p)
        if base.store_key is None:
            rotated: Any = _Mapped(lambda d: rotate(at.kv_idx, d, x, p))
            return inner(at, rotated, p)
        restored = _Mapped(lambda d: inner(replace(at, dim=d), x, p))
        return rotate(at.kv_idx, at.dim, restored, p)

    def rotated_query(at: Any, x: Any, p: Any) -> Expr:
        if base.query is None:
            return rotate(at.q_idx, at.dim, x, p)
        rotated: Any = _Mapped(lambda d: rotate(at.q_idx, d, x, p))
        return base.query(at, rotated, p)

    style = ("gptj" if interleaved else "llama") + ("" if query else "_keys")
    return base.extended(
        f"{base.name}_rope_table{rotary_dim}_{style}",
        params={ROPE_TABLE: Tensor(ndim=3)},
        key=key,
        **({"query": rotated_query} if query else {}),
    )


def rope_turn_table(
    frequencies: npt.ArrayLike,
    positions: int,
    *,
    magnitude: float = 1.0,
    interleaved: bool = False,
) -> npt.NDArray[np.float32]:
    """The parameter of :func:`rope_table`, from radians per position, for so many positions."""
    angles = np.arange(positions)[:, None] * np.asarray(frequencies, np.float64)
    cos, sin = magnitude * np.cos(angles), magnitude * np.sin(angles)
    axis = 2 if interleaved else 1
    table = [np.stack([a, b], axis).reshape(positions, -1) for a, b in ((cos, cos), (-sin, sin))]
    return np.stack(table, 1).astype(np.float32)


class _Mapped:
    """A head vector whose elements are computed: ``function(d)``."""

    def __init__(self, function: Callable[[Any], Expr]) -> None:
        self._function = function

    def __getitem__(self, d: Any) -> Expr:
        return self._function(d)


class _Scaled:
    """A head vector times a scale that may depend on the element."""

    def __init__(self, x: Any, scale: Callable[[Any], Expr]) -> None:
        self._x = x
        self._scale = scale

    def __getitem__(self, d: Any) -> Expr:
        return self._x[d] * self._scale(d)


def quantized(scales: str = "channel", *, base: Variant = causal) -> Variant:
    """A pool of scaled numbers: ``float8_e4m3fn``, ``float8_e5m2``, ``int8`` or ``int4``.

    What is read from it is multiplied by ``k_scale`` and ``v_scale`` before anything ``base`` does
    to it, and divided by them before it is stored.

    Parameters
    ----------
    scales : str
        ``channel``: ``[KV heads, dim]``. ``token``: ``[places in the pool, KV heads]``, a place
        being page * page_size + offset; they are set before tokens are stored.
    base : Variant
        What else happens.
    """
    if scales not in ("channel", "token"):
        raise ValueError(f"scales is {scales!r}, expected channel or token")

    def scaled(name: str, then: Any) -> Any:
        def function(at: Any, x: Any, p: Any) -> Expr:
            scale = getattr(p, name)

            def of(d: Any) -> Expr:
                return scale[at.kv_head, d] if scales == "channel" else scale[at.row, at.kv_head]

            x = _Scaled(x, of)
            return x[at.dim] if then is None else then(at, x, p)

        return function

    def divided(name: str, first: Any) -> Any:
        def function(at: Any, x: Any, p: Any) -> Expr:
            scale = getattr(p, name)
            value = x[at.dim] if first is None else first(at, x, p)
            if scales == "channel":
                return value / scale[at.kv_head, at.dim]
            return value / scale[at.row, at.kv_head]

        return function

    return base.extended(
        f"{base.name}_{scales}_scales",
        params={"k_scale": Tensor(ndim=2), "v_scale": Tensor(ndim=2)},
        key=scaled("k_scale", base.key),
        value=scaled("v_scale", base.value),
        store_key=divided("k_scale", base.store_key),
        store_value=divided("v_scale", base.store_value),
    )
