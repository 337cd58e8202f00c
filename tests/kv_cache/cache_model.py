"""A plain model of the KV cache: every token of every sequence in NumPy arrays.

:class:`Twin` makes each call on a real cache and on the model, and compares what comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from tvm_flashinfer.kv_cache import KVCache

Array = np.ndarray[Any, Any]

#: Largest absolute error of attention over standard-normal data, by dtype of the output.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def numpy_dtype(dtype: str) -> Any:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def to_tvm(array: Array) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def reference_attention(q: Array, k: Array, v: Array, visible: Array | None = None) -> Array:
    """Attention in float64. The last query sits on the last key, and sees no later one.

    q: [n, Hq, D]; k: [t, Hkv, D]; v: [t, Hkv, Dv]; visible: [n, t], causal unless given.
    """
    if q.shape[0] == 0:
        return np.zeros((0, q.shape[1], v.shape[2]))
    group = q.shape[1] // k.shape[1]
    keys = np.repeat(k.astype(np.float64), group, axis=1)
    values = np.repeat(v.astype(np.float64), group, axis=1)
    logits = np.einsum("nhd,thd->hnt", q.astype(np.float64), keys) * q.shape[-1] ** -0.5
    if visible is None:
        n, t = q.shape[0], k.shape[0]
        visible = np.arange(t)[None] <= np.arange(n)[:, None] + t - n
    logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hnt,thd->nhd", weights, values)


@dataclass(frozen=True)
class Dims:
    """Sizes of the cache under test."""

    num_layers: int = 2
    num_qo_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    max_batch_size: int = 8
    max_total_seq_len: int = 320
    prefill_chunk_size: int = 64
    page_size: int = 16
    dtype: str = "float32"
    first_layer: int = 0

    @property
    def num_pages(self) -> int:
        return -(-self.max_total_seq_len // self.page_size)

    def create(self) -> KVCache:
        return KVCache.create(**{name: getattr(self, name) for name in self.__dataclass_fields__})


@dataclass
class Tokens:
    """K and V of one sequence: [layers, length, heads, dim]."""

    k: Array
    v: Array

    @property
    def length(self) -> int:
        return int(self.k.shape[1])

    def __getitem__(self, tokens: slice) -> Tokens:
        return Tokens(self.k[:, tokens].copy(), self.v[:, tokens].copy())

    def extended(self, k: Array, v: Array) -> Tokens:
        return Tokens(np.concatenate([self.k, k], 1), np.concatenate([self.v, v], 1))


@dataclass
class Twin:
    """A cache and its model, side by side."""

    dims: Dims = field(default_factory=Dims)
    seed: int = 0

    def __post_init__(self) -> None:
        self.cache = self.dims.create()
        self.sequences: dict[int, Tokens] = {}
        self.rng = np.random.default_rng(self.seed)
        self.forms = 0

    def random(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape, np.float32).astype(numpy_dtype(self.dims.dtype))

    def empty_tokens(self, length: int = 0) -> Tokens:
        d = self.dims
        shape = (d.num_layers, length, d.num_kv_heads, d.head_dim)
        return Tokens(np.zeros(shape, numpy_dtype(d.dtype)), np.zeros(shape, numpy_dtype(d.dtype)))

    # -- calls on both

    def add(self, seq_id: int) -> None:
        self.cache.add_sequence(seq_id)
        self.sequences[seq_id] = self.empty_tokens()

    def remove(self, seq_id: int) -> None:
        self.cache.remove_sequence(seq_id)
        del self.sequences[seq_id]

    def fork(self, parent: int, child: int, position: int = -1) -> None:
        self.cache.fork_sequence(parent, child, position)
        tokens = self.sequences[parent]
        self.sequences[child] = tokens[: tokens.length if position == -1 else position]

    def pop(self, seq_id: int, count: int) -> None:
        self.cache.pop(seq_id, count)
        tokens = self.sequences[seq_id]
        self.sequences[seq_id] = tokens[: tokens.length - count]

    def forward(
        self, seq_ids: Sequence[int], lengths: Sequence[int], form: str | None = None
    ) -> None:
        """One step over every layer. Attention is compared with the oracle, token by token.

        ``form`` is "token", "head" (the order of q's axes) or "fused"; they take turns otherwise.
        """
        if form is None:
            form = ("token", "head", "fused")[self.forms % 3]
            self.forms += 1
        d, n = self.dims, sum(lengths)
        q = self.random(d.num_layers, n, d.num_qo_heads, d.head_dim)
        k = self.random(d.num_layers, n, d.num_kv_heads, d.head_dim)
        v = self.random(d.num_layers, n, d.num_kv_heads, d.head_dim)
        before = {s: self.sequences[s].length for s in seq_ids}
        with self.cache.step(seq_ids, lengths):
            at = 0
            positions = self.cache.query_positions().numpy()
            assert positions.dtype == np.int32
            assert positions.tolist() == [
                before[s] + i
                for s, count in zip(seq_ids, lengths, strict=True)
                for i in range(count)
            ]
            outputs = [
                self._attend(d.first_layer + layer, q[layer], k[layer], v[layer], form)
                for layer in range(d.num_layers)
            ]
        for seq_id, count in zip(seq_ids, lengths, strict=True):
            new = slice(at, at + count)
            tokens = self.sequences[seq_id].extended(k[:, new], v[:, new])
            self.sequences[seq_id] = tokens
            for layer in range(d.num_layers):
                expected = reference_attention(q[layer, new], tokens.k[layer], tokens.v[layer])
                error = np.abs(outputs[layer][new].astype(np.float64) - expected)
                assert error.max(initial=0.0) <= TOLERANCE[d.dtype], (seq_id, layer, form)
            at += count

    def _attend(self, layer: int, q: Array, k: Array, v: Array, form: str) -> Array:
        out = tvm.runtime.empty(q.shape, self.dims.dtype)
        if form == "fused":
            self.cache.attention_fused_qkv(layer, to_tvm(np.concatenate([q, k, v], 1)), out)
        elif form == "head":
            heads = [to_tvm(x.transpose(1, 0, 2)[None]) for x in (q, k, v)]
            self.cache.attention(layer, *heads, out, head_major=True)
        else:
            self.cache.attention(layer, to_tvm(q), to_tvm(k), to_tvm(v), out)
        return np.asarray(out.numpy())

    # -- comparisons

    def cached(self, seq_id: int, begin: int, end: int) -> Tokens:
        d = self.dims
        shape = (d.num_layers, end - begin, d.num_kv_heads, d.head_dim)
        k, v = (tvm.runtime.empty(shape, d.dtype) for _ in range(2))
        self.cache.get_kv(seq_id, begin, end, k, v)
        return Tokens(k.numpy(), v.numpy())

    def check(self) -> None:
        """K and V of every token, bit for bit, and every number the cache tells."""
        for seq_id, tokens in self.sequences.items():
            assert self.cache.length(seq_id) == tokens.length
            found = self.cached(seq_id, 0, tokens.length)
            assert found.k.tobytes() == tokens.k.tobytes(), f"keys of sequence {seq_id}"
            assert found.v.tobytes() == tokens.v.tobytes(), f"values of sequence {seq_id}"
        assert self.cache.total_length == sum(t.length for t in self.sequences.values())
        assert self.cache.is_empty == (not self.sequences)
        if not self.sequences:
            assert self.cache.num_free_pages == self.dims.num_pages
