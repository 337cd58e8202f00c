"""Caches under measurement: ours and TVM's, filled and driven alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from ..kv_cache import KVCache
from .report import Row
from .suites import Context
from .timing import Call
from .tvm_kv_cache import TVMKVCache

SUITE = "kv-cache"
PEER = "tvm"
PAGE = 16
DIM = 128
Heads = tuple[int, int]
#: Of Llama-3.1-8B.
HEADS: Heads = (32, 8)
#: Enough that a layer's keys and values have left the caches when its turn comes again.
GENERATION_LAYERS = 4


class Subject:
    """A cache under measurement: sequences are filled, and steps take a token each."""

    def __init__(
        self,
        cache: KVCache,
        heads: Heads,
        dim: int = DIM,
        dtype: str = "float32",
        layers: int = 1,
    ) -> None:
        self.cache = cache
        self.heads, self.dim, self.dtype, self.layers = heads, dim, dtype, layers
        self._rng = np.random.default_rng(0)
        self._operands: dict[int, tuple[Any, Any]] = {}

    def _random(self, *shape: int) -> Any:
        return self._rng.standard_normal(shape, dtype=np.float32).astype(self.dtype)

    def fill(self, seq_id: int, count: int) -> None:
        """Append random keys and values, without attention."""
        qo, kv = self.heads
        if isinstance(self.cache, TVMKVCache):
            qkv = tvm.runtime.tensor(self._random(count, qo + 2 * kv, self.dim))
            out = tvm.runtime.empty((count, qo, self.dim), self.dtype)
            self.cache.filling = True
            with self.cache.step([seq_id], [count]):
                for layer in range(self.layers):
                    self.cache.attention_fused_qkv(layer, qkv, out)
            self.cache.filling = False
            return
        begin = self.cache.length(seq_id)
        with self.cache.step([seq_id], [count]):
            pass
        k, v = (
            tvm.runtime.tensor(self._random(self.layers, count, kv, self.dim)) for _ in range(2)
        )
        self.cache.set_kv(seq_id, begin, k, v)

    def begin_and_end(self, seq_ids: Sequence[int]) -> Callable[[], float]:
        """A call that begins a step of a token each and takes it back: seconds of begin_forward."""
        handle = self.cache.handle
        begin, end, pop = (
            tvm.get_global_func(f"vm.builtin.kv_state_{name}")
            for name in ("begin_forward", "end_forward", "popn")
        )
        ids, ones = tvm_ffi.Shape(seq_ids), tvm_ffi.Shape([1] * len(seq_ids))

        def call() -> float:
            start = time.perf_counter()
            begin(handle, ids, ones)
            seconds = time.perf_counter() - start
            end(handle)
            for seq_id in seq_ids:
                pop(handle, seq_id, 1)
            return seconds

        return call

    def step(self, seq_ids: Sequence[int]) -> None:
        """Append a token to each sequence and attend."""
        count, (qo, kv) = len(seq_ids), self.heads
        if count not in self._operands:
            qkv = tvm.runtime.tensor(self._random(count, qo + 2 * kv, self.dim))
            self._operands[count] = qkv, tvm.runtime.empty((count, qo, self.dim), self.dtype)
        with self.cache.step(seq_ids, [1] * count):
            for layer in range(self.layers):
                self.cache.attention_fused_qkv(layer, *self._operands[count])

    def decode(self, seq_ids: Sequence[int], *, pop: bool = True) -> Call:
        """A step; with ``pop`` it leaves the cache as it was."""

        def call(turn: int) -> None:
            self.step(seq_ids)
            for seq_id in seq_ids if pop else ():
                self.cache.pop(seq_id, 1)

        return call


def caches(heads: Heads, batch: int, tokens: int, layers: int = 1) -> dict[str, Subject]:
    """Ours, and TVM's, with room for so many tokens."""
    qo, kv = heads
    sizes: dict[str, Any] = {
        "num_qo_heads": qo,
        "num_kv_heads": kv,
        "head_dim": DIM,
        "num_layers": layers,
        "max_batch_size": batch,
        # TVM counts a page of slack for each block of a sequence.
        "max_total_seq_len": tokens + 2 * PAGE * (batch + 1),
        "prefill_chunk_size": 4096,
    }
    caches = {"ours": KVCache.create(page_size=PAGE, **sizes), PEER: TVMKVCache(**sizes)}
    return {name: Subject(cache, heads, layers=layers) for name, cache in caches.items()}


def kv_bytes(heads: Heads, tokens: int, layers: int = 1) -> int:
    return layers * 2 * tokens * heads[1] * DIM * 4


def add_row(
    context: Context,
    case: str,
    metric: str,
    unit: str,
    values: dict[str, float],
    floor: float | None,
    samples: int,
) -> None:
    peers = {name: value for name, value in values.items() if name != "ours"}
    context.report.rows.append(
        Row(SUITE, case, metric, unit, "lower", values["ours"], floor, peers, samples)
    )
