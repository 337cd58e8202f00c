"""tvm_flashinfer.graph_key: what makes two steps share a captured CUDA graph."""

from __future__ import annotations

import numpy as np
import tvm
import tvm_ffi

from tvm_flashinfer.kv_cache import KVCache


def key(args: list[object], *extents: int) -> list[int]:
    found = tvm_ffi.get_global_func("tvm_flashinfer.graph_key")(args, tvm_ffi.Shape(extents))
    return list(found)


def test_equal_where_every_address_is_and_for_each_extent_another() -> None:
    x, y = (tvm.runtime.tensor(np.zeros(4, np.float32)) for _ in range(2))
    args = [x, [y, x]]
    assert key([*args, tvm_ffi.Shape((4,))], 4) == key([*args, tvm_ffi.Shape((4,))], 4)
    assert key(args, 4)[0] == 4
    assert key(args, 4) != key(args, 5)
    assert key([x, [y, x]]) != key([x, [x, y]])


def test_every_cache_has_graphs_of_its_own() -> None:
    caches = [
        KVCache.create(
            num_layers=1, num_qo_heads=1, num_kv_heads=1, head_dim=32, max_total_seq_len=16
        )
        for _ in range(2)
    ]
    first, second = (key([cache.handle], 1) for cache in caches)
    assert first == key([caches[0].handle], 1)
    assert first != second
