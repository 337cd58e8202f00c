"""The sequences of TVM's files for latent attention, test_runtime_builtin_paged_attention_kv_cache_
mla_{tir,flashinfer}.py: the same as of its other files, over a cache of kind mla.

A step stores latent rows. Its own tokens are attended with expanded keys and values, what is cached
with queries that have absorbed the expansion (DeepSeek-V2, appendix), and the two states merge. All
of it must be plain attention over expanded keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from test_tvm_scenarios import (  # noqa: F401 - run again, with the driver below
    test_forks,
    test_pops,
    test_prefill_and_decode,
    test_prefixes_of_prefixes,
    test_removal,
)
from tvm_driver import CREATE, MLA, Array, Batch, builtin, to_tvm, tvm_arguments

TOLERANCE = {"float32": 2e-5, "float16": 1e-3}


def einsum(terms: str, *operands: Array) -> Array:
    """By matrix products: 128 heads take minutes otherwise."""
    return np.asarray(np.einsum(terms, *operands, optimize=True))


@dataclass
class LatentDriver:
    """As Driver, of a cache of latent attention. A key is a latent row."""

    dtype: str
    num_heads: int
    latent: int
    rope: int
    nope: int
    num_layers: int = 2

    def __post_init__(self) -> None:
        row = self.latent + self.rope
        ragged = ["", None, None, self.nope + self.rope, self.nope]
        self.cache = tvm.get_global_func(CREATE)(
            *tvm_arguments(
                bounds=[32, 2048, 512, 16, 0],
                layers=(0, self.num_layers),
                heads=(self.num_heads, 1, row, self.latent),
                kinds=[MLA] * self.num_layers,
                dtype=self.dtype,
                ragged=ragged,
            )
        )
        self.rng = np.random.default_rng(0)
        self.keys: dict[int, Array] = {}
        # Of a latent to the keys and to the values of every head.
        self.w_k, self.w_v = self.rng.uniform(
            -0.1, 0.1, (2, self.num_heads, self.latent, self.nope)
        )
        self.scale = (self.nope + self.rope) ** -0.5

    # -- sequences

    def clear(self) -> None:
        builtin("kv_state_clear", self.cache)
        self.keys.clear()

    def fork(self, child: int, parent: int, position: int = -1) -> None:
        builtin("kv_state_fork_sequence", self.cache, parent, child, position)
        self.keys[child] = self.keys[parent][:, : None if position == -1 else position]

    def pop(self, seq_id: int, count: int) -> None:
        builtin("kv_state_popn", self.cache, seq_id, count)
        self.keys[seq_id] = self.keys[seq_id][:, : self.keys[seq_id].shape[1] - count]

    def remove(self, seq_id: int) -> None:
        builtin("kv_state_remove_sequence", self.cache, seq_id)
        del self.keys[seq_id]

    # -- steps

    def expanded(self, rows: Array) -> tuple[Array, Array]:
        """Keys [token, head, nope + rope] and values [token, head, nope] of latent rows."""
        latent, turned = np.split(rows.astype(np.float64), [self.latent], -1)
        k, v = (einsum("tl,hlc->thc", latent, w) for w in (self.w_k, self.w_v))
        turned = np.broadcast_to(turned[:, None], (*k.shape[:2], self.rope))
        return np.concatenate([k, turned], -1), v

    def step(self, batch: Batch) -> None:
        for seq_id, _ in batch:
            if seq_id not in self.keys:
                builtin("kv_state_add_sequence", self.cache, seq_id)
                self.keys[seq_id] = np.zeros((self.num_layers, 0, self.latent + self.rope))
        lengths = [count for _, count in batch]
        ids = tvm_ffi.Shape([seq_id for seq_id, _ in batch])
        builtin("kv_state_begin_forward", self.cache, ids, tvm_ffi.Shape(lengths))
        n = sum(lengths)
        shape = (self.num_layers, n, self.num_heads, self.nope + self.rope)
        q = self.rng.uniform(-0.1, 0.1, shape).astype(self.dtype)
        rows = self.rng.uniform(-0.1, 0.1, (self.num_layers, n, self.latent + self.rope))
        rows = rows.astype(self.dtype)
        # TVM's tests, like models, attend in parts unless every sequence gains one token.
        decodes = all(count == 1 for count in lengths)
        outputs = [self.attend(layer, q[layer], rows[layer], decodes) for layer in range(len(q))]
        builtin("kv_state_end_forward", self.cache)
        at = 0
        for seq_id, count in batch:
            new = slice(at, at + count)
            at += count
            self.keys[seq_id] = np.concatenate([self.keys[seq_id], rows[:, new]], 1)
            for layer, out in enumerate(outputs):
                expected = self.expected(seq_id, layer, q[layer, new])
                atol = TOLERANCE[self.dtype]
                np.testing.assert_allclose(out[new], expected, rtol=1e-3, atol=atol)
        self.verify([seq_id for seq_id, _ in batch])

    def attend(self, layer: int, q: Array, rows: Array, decodes: bool) -> Array:
        """What a model calls in a layer: the step's output [token, head, nope]."""
        n, heads, cache = len(q), self.num_heads, self.cache
        builtin("attention_kv_cache_append_mla_kv", cache, layer, to_tvm(rows))
        own, lse = tvm.runtime.empty((n, heads, self.nope), self.dtype), self.empty_lse(n)
        if not decodes:
            operands = [
                to_tvm(x) for x in (q, *(x.astype(self.dtype) for x in self.expanded(rows)))
            ]
            name = "attention_kv_cache_self_attention"
            builtin(name, cache, layer, self.scale, *operands, own, lse)
        content, turned = np.split(q.astype(np.float64), [self.nope], -1)
        absorbed = np.concatenate([einsum("thc,hlc->thl", content, self.w_k), turned], -1)
        past, past_lse = tvm.runtime.empty((n, heads, self.latent), self.dtype), self.empty_lse(n)
        name = "attention_kv_cache_cross_attention"
        query = to_tvm(absorbed.astype(self.dtype))
        builtin(name, cache, layer, self.scale, query, past, past_lse)
        projected = einsum("thl,hlc->thc", past.numpy().astype(np.float64), self.w_v)
        if decodes:
            return projected
        merge = "attention_kv_cache_merge_attn_output_inplace"
        builtin(merge, cache, own, lse, to_tvm(projected.astype(self.dtype)), past_lse)
        return own.numpy().astype(np.float64)

    def empty_lse(self, n: int) -> Any:
        return tvm.runtime.empty((n, self.num_heads), "float32")

    def expected(self, seq_id: int, layer: int, q: Array) -> Array:
        """Of a sequence's last tokens: causal attention over all its expanded keys."""
        k, v = self.expanded(self.keys[seq_id][layer])
        logits = einsum("nhd,thd->hnt", q.astype(np.float64), k) * self.scale
        logits = np.where(np.tri(len(q), len(k), len(k) - len(q), dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return einsum("hnt,thd->nhd", weights / weights.sum(-1, keepdims=True), v)

    # -- comparisons

    def verify(self, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            rows = self.keys[seq_id]
            length = rows.shape[1]
            assert builtin("attention_kv_cache_get_sequence_length", self.cache, seq_id) == length
            if length == 0:
                continue
            found = tvm.runtime.empty(rows.shape, self.dtype)
            get = "attention_kv_cache_debug_get_kv_mla"
            builtin(get, self.cache, seq_id, 0, length, found)
            assert (found.numpy() == rows).all()

    @property
    def is_empty(self) -> bool:
        return bool(builtin("attention_kv_cache_empty", self.cache))


#: Heads, and elements of a latent, of what is rotated, and of what is not.
SMALL = (8, 64, 16, 32)
#: Of TVM's files, and of DeepSeek-V2.
WHOLE = (128, 512, 64, 128)


@pytest.fixture(
    params=[
        pytest.param(("float32", *SMALL), id="float32-small"),
        pytest.param(("float16", *SMALL), id="float16-small"),
        pytest.param(("float16", *WHOLE), id="float16-deepseek", marks=pytest.mark.heavy),
    ]
)
def driver(request: pytest.FixtureRequest) -> LatentDriver:
    return LatentDriver(*request.param)
