"""Suite ``kv-cache``: the cache beside TVM's own object, and its formats beside each other.

Both caches are driven through the same ``vm.builtin`` functions: fused QKV, pages of 16. Attention
steps are ``begin_forward``, the layers, ``end_forward``; their floor is a plain read of the keys
and values that can't help being read.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from ..attention import BatchAttention
from ..kv_cache import KVCache
from ..layout import BlockSparseLayout
from ..rope import RopeConfig
from ..variants import rope_table, rope_turn_table
from .kv_formats import SHAPES, Shape, formats, parallel_generation
from .kv_subject import DIM, HEADS, PAGE, SUITE, Subject, add_row, caches, kv_bytes
from .machine import read_bandwidth
from .suites import Context
from .timing import REST, Call, clock_of, measure

__all__ = ["run"]


def run(
    context: Context,
    *,
    batch: int = 64,
    length: int = 4096,
    prompt: int = 2048,
    suffix: int = 256,
    children: Sequence[int] = (4, 8, 16, 32),
    cycles: int = 100_000,
    window: int = 2048,
    shapes: Sequence[Shape] = SHAPES,
) -> None:
    """Adds the rows of this suite to ``context.report``."""
    if context.device != "cpu":
        context.report.skipped[SUITE] = f"it measures the cpu, not {context.device}"
        return
    _steps(context, batch, length)
    for n in children:
        parallel_generation(context, n, prompt, suffix)
    formats(context, shapes)
    _streaming(context, window)
    _cycles(context, cycles)


def _steps(context: Context, batch: int, length: int) -> None:
    """begin_forward, and the attention of a layer, over sequences that share nothing."""
    begin_case, step_case = (f"{what} {batch}x{length}" for what in ("begin_forward", "step"))
    if not context.wants(begin_case) and not context.wants(step_case):
        return
    context.progress(step_case)
    # A fourth of HEADS: with all of them the two caches would take 4 GiB, and TVM's step seconds.
    heads = (8, 2)
    subjects = caches(heads, batch, batch * length)
    everyone = list(range(batch))
    for subject in subjects.values():
        for seq_id in everyone:
            subject.cache.add_sequence(seq_id)
            for begin in range(0, length - 1, 4096):
                subject.fill(seq_id, min(4096, length - 1 - begin))
    if context.wants(begin_case):
        calls = {name: subject.begin_and_end(everyone) for name, subject in subjects.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(110):
            for name, call in calls.items():
                taken = call()
                if turn >= 10:  # earlier ones grow what they will need
                    times[name].append(taken)
        values = {name: 1e6 * statistics.median(values) for name, values in times.items()}
        add_row(context, begin_case, "time of begin_forward", "us", values, None, 100)
    if context.wants(step_case):
        seconds, samples = measure(
            {name: subject.decode(everyone) for name, subject in subjects.items()}, REST
        )
        floor = 1e3 * kv_bytes(heads, batch * length) / read_bandwidth(context.threads)
        values = {name: 1e3 * value for name, value in seconds.items()}
        case = f"{step_case}, {heads[0]}/{heads[1]} heads"
        add_row(context, case, "attention step", "ms", values, floor, samples)


def _streaming(context: Context, window: int) -> None:
    """StreamingLLM: a window behind four sinks, keys rotated for their places in the cache."""
    for batch in (1, 8):
        case = f"StreamingLLM {batch}x{window}, sink 4"
        if not context.wants(case):
            continue
        if importlib.util.find_spec("torch") is None:
            context.report.skipped[case] = "not installed: pip install 'tvm-flashinfer[torch]'"
            continue
        context.progress(case)
        contenders = dict(_streamers(batch, window))
        seconds, samples = measure(contenders, REST, clock_of(context.threads))
        values = {name: 1e3 * value for name, value in seconds.items()}
        floor = 1e3 * kv_bytes(HEADS, batch * window) / read_bandwidth(context.threads)
        add_row(context, case, "attention of a token", "ms", values, floor, samples)


def _streamers(batch: int, window: int) -> Iterator[tuple[str, Call]]:
    config = RopeConfig()
    qo, kv = HEADS
    sizes: dict[str, Any] = {
        "num_layers": 1,
        "num_qo_heads": qo,
        "num_kv_heads": kv,
        "head_dim": DIM,
        "max_batch_size": batch,
        "max_total_seq_len": batch * (window + PAGE),
        "prefill_chunk_size": window,
        "page_size": PAGE,
        "sliding_window": True,
    }
    frequencies, magnitude = config.resolve(DIM)
    caches = {
        "ours": KVCache.create(rope=config, **sizes),
        "ours, rotated when read": KVCache.create(
            variant=rope_table(DIM),
            variant_params={
                "rope_table": rope_turn_table(
                    frequencies, sizes["max_total_seq_len"], magnitude=magnitude
                )
            },
            **sizes,
        ),
    }
    for name, cache in caches.items():
        subject = Subject(cache, HEADS)
        for seq_id in range(batch):
            cache.add_sequence(seq_id)
            subject.fill(seq_id, window)
            cache.enable_sliding_window(seq_id, window, 4)
        yield name, subject.decode(range(batch), pop=False)
    yield "rotated apart", _rotated_apart(batch, window, frequencies)


def _rotated_apart(batch: int, window: int, frequencies: Any) -> Call:
    """A step as without fusion: PyTorch rotates query and keys, our kernel attends the result."""
    import torch

    qo, kv = HEADS
    attention = BatchAttention(
        qo, kv, DIM, max_requests=batch, max_q_tokens=batch, max_kv_pages=batch
    )
    attention.plan(BlockSparseLayout.dense(batch, 1, window))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((batch, qo, DIM), generator=generator)
    k, v = (torch.randn((batch, window, kv, DIM), generator=generator) for _ in range(2))
    angles = torch.arange(window)[:, None] * torch.as_tensor(frequencies)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    rotated_k = torch.empty_like(k)
    out = torch.empty_like(q)
    half = DIM // 2

    def rotate(x: Any, cos: Any, sin: Any, to: Any) -> None:
        torch.mul(x, cos, out=to)
        to[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        to[..., half:].addcmul_(x[..., :half], sin[..., half:])

    rotated_q = torch.empty_like(q)

    def call(turn: int) -> None:
        rotate(q, cos[-1], sin[-1], rotated_q)
        rotate(k, cos, sin, rotated_k)
        attention.run(rotated_q, rotated_k, v, out=out)

    return call


def _cycles(context: Context, cycles: int) -> None:
    """Add, append, fork, append to both, remove: memory and time must not grow."""
    case = "cycles"
    if not context.wants(case):
        return
    context.progress(f"{cycles} cycles of add, append, fork and remove")
    heads, live = (2, 1), 32
    sizes: dict[str, Any] = {
        "num_qo_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 64,
        "max_batch_size": 4,
    }
    cache = KVCache.create(
        num_layers=1, page_size=PAGE, max_total_seq_len=live * 1024, prefill_chunk_size=512, **sizes
    )
    pages = cache.num_free_pages
    subject = Subject(cache, heads, dim=64)
    rng = np.random.default_rng(0)
    alive: list[int] = []
    parts = 10
    lengths = rng.integers(1, 400, cycles).tolist()
    begin = cast(Callable[..., None], cache.begin_forward)
    for part in range(parts):
        gc.collect()
        start = time.perf_counter()
        for cycle in range(part * cycles // parts, (part + 1) * cycles // parts):
            parent, child = 2 * cycle, 2 * cycle + 1
            cache.add_sequence(parent)
            begin([parent], [lengths[cycle]])
            cache.end_forward()
            cache.fork_sequence(parent, child)
            subject.step([parent, child])
            cache.remove_sequence(parent)
            alive.append(child)
            if len(alive) == live:
                cache.remove_sequence(alive.pop(0))
        seconds = (time.perf_counter() - start) / (cycles // parts)
        name = f"{case} to {(part + 1) * cycles // parts}"
        add_row(
            context, name, "time of a cycle", "us", {"ours": 1e6 * seconds}, None, cycles // parts
        )
        add_row(context, name, "resident memory", "MiB", {"ours": _resident() / 2**20}, None, 1)
    for seq_id in alive:
        cache.remove_sequence(seq_id)
    if cache.num_free_pages != pages or not cache.is_empty:
        raise AssertionError(f"{pages - cache.num_free_pages} pages were lost in {cycles} cycles")


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
