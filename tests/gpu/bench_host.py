# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Host time of a cache's begin_forward, beside TVM's own cache's, and of a plan of BatchAttention.

Both caches are asked for the query positions too: TVM's sends its tables to the device only then.
TVM's is given functions that do nothing: none of its kernels runs. Both get the same shapes, made
before the clock runs, as an engine in C++ has them; what a step takes from lists of Python, through
`KVCache`, is told beside it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness.build import ROOT
from harness.runtime import load as load_runtime
from kernels import Kernel, load, stand_in

sys.path.insert(0, str(ROOT))

import tvm_ffi

from tvm_flashinfer import attention as attention_module
from tvm_flashinfer import kv_cache
from tvm_flashinfer.attention import BatchAttention
from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.layout import BlockSparseLayout

tvm = load_runtime()

LENGTH, CHUNK = 4096, 4096
HEADS = {"num_qo_heads": 4, "num_kv_heads": 1, "head_dim": 32}


def median_us(call: Callable[[], Any], after: Callable[[], Any], repeats: int = 60) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
        after()
    return statistics.median(times[10:])


def our_cache(batch: int) -> KVCache:
    kv_cache.kernel_maker = lambda *_: (lambda spec: load(spec.label), tvm.cuda(0))
    return KVCache.create(
        num_layers=1,
        **HEADS,
        max_total_seq_len=batch * (LENGTH + 128),
        max_batch_size=batch,
        prefill_chunk_size=CHUNK,
        dtype="float16",
        device="cuda",
    )


def tvm_cache(batch: int) -> KVCache:
    nothing = tvm_ffi.convert(lambda *_: None)
    function = ["tirx", nothing]
    create = tvm.get_global_func("vm.builtin.paged_attention_kv_cache_create")
    bounds = (batch, batch * (LENGTH + 128), CHUNK, 16, 0)
    return KVCache(
        create(
            tvm_ffi.Shape(bounds),
            tvm_ffi.Shape((0, 1)),
            HEADS["num_qo_heads"],
            HEADS["num_kv_heads"],
            HEADS["head_dim"],
            HEADS["head_dim"],
            tvm_ffi.Shape([0]),
            False,
            0,
            1.0,
            1e4,
            0,
            tvm.runtime.empty((), "float16", tvm.cuda(0)),
            nothing,
            None,
            *[function] * 7,
            [],
            [nothing],
            *[nothing] * 4,
        )
    )


def begin_forward(make: Callable[[int], KVCache], batch: int) -> tuple[float, float]:
    """Microseconds of the function that an engine calls, and from lists of Python."""
    cache = make(batch)
    for seq_id in range(batch):
        cache.add_sequence(seq_id)
        with cache.step([seq_id], [LENGTH]):
            pass
    ids = np.random.default_rng(0).permutation(batch).tolist()
    shapes = tvm_ffi.Shape(ids), tvm_ffi.Shape([1] * batch)
    function = tvm.get_global_func("vm.builtin.kv_state_begin_forward")
    positions = tvm.get_global_func("vm.builtin.attention_kv_cache_get_query_positions")

    def begin() -> None:
        function(cache.handle, *shapes)
        positions(cache.handle)

    def from_lists() -> None:
        cache.begin_forward(ids, [1] * batch)
        cache.query_positions()

    return median_us(begin, cache.end_forward), median_us(from_lists, cache.end_forward)


def plan(batch: int) -> float:
    attention_module._kernel_of = lambda *_: load(Kernel("causal", 32, 32))
    step = BatchAttention(
        4,
        1,
        32,
        32,
        dtype="float16",
        kv_dtype="float16",
        variant=stand_in("causal"),
        device="cuda",
        max_requests=batch,
        max_q_tokens=batch,
        max_kv_pages=batch * LENGTH // 16,
    )
    indptr = np.arange(batch + 1, dtype=np.int32)
    pages = np.random.default_rng(0).permutation(batch * LENGTH // 16).astype(np.int32)
    last = np.full(batch, 16, np.int32)
    layout = BlockSparseLayout.paged(indptr, indptr * (LENGTH // 16), pages, last, 16)
    return median_us(lambda: step.plan(layout), lambda: None)


def main() -> None:
    for batch in (64, 256):
        ours, lists = begin_forward(our_cache, batch)
        try:
            theirs, _ = begin_forward(tvm_cache, batch)
            beside = f"TVM's {theirs:.1f}, ours {ours / theirs:.2f} x"
        except Exception as error:  # ours is a figure all the same
            beside = f"TVM's cache failed: {type(error).__name__}: {error}"
        print(
            f"begin_forward {batch}x{LENGTH}, host: {ours:.1f} us; {beside}; "
            f"ours from lists {lists:.1f} us",
            flush=True,
        )
    print(f"BatchAttention.plan 256x{LENGTH}, host, from Python: {plan(256):.1f} us", flush=True)


if __name__ == "__main__":
    main()
