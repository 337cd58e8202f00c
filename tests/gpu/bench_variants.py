# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Latent attention, shared prefixes, RoPE in the kernel and fp8 pools, by graph replays over pools
that rotate beyond the L2 cache. The floor is a plain read of as many bytes in the same process."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_model import read_bandwidth
from harness.build import ROOT
from harness.runtime import load as load_runtime
from kernels import Kernel, batch_attention
from modules import FOLDER
from rotate import rotate_keys

sys.path.insert(0, str(ROOT))
from tvm_flashinfer import variants
from tvm_flashinfer.layout import BlockSparseLayout, PrefixLevel

load_runtime()

PAGE = 16


def microseconds(launches: list[Callable[[], Any]], repeats: int = 20) -> float:
    """Median time of one launch, each of the list in turn, as one graph."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


def decode(batch: int, length: int) -> BlockSparseLayout:
    pages = length // PAGE
    ids = np.random.default_rng(0).permutation(batch * pages).astype(np.int32)
    return BlockSparseLayout.paged(
        np.arange(batch + 1, dtype=np.int32),
        np.arange(batch + 1, dtype=np.int32) * pages,
        ids,
        np.full(batch, PAGE, np.int32),
        PAGE,
    )


def latent(bandwidth: float, heads: int) -> None:
    step = batch_attention(
        Kernel("causal", 576, 512, "bfloat16", "bfloat16"),
        (heads, 1),
        max_requests=64,
        max_q_tokens=64,
        max_kv_pages=64 * 256,
    )
    step.plan(decode(64, 4096))
    q = torch.randn((64, heads, 576), dtype=torch.bfloat16, device="cuda")
    pools = [
        torch.randn((64 * 256, PAGE, 1, 576), dtype=torch.bfloat16, device="cuda") for _ in range(4)
    ]
    out = torch.empty((64, heads, 512), dtype=torch.bfloat16, device="cuda")
    time = microseconds([lambda k=k: step.run(q, k, k[..., :512], out=out) for k in pools])
    floor = 64 * 4096 * 576 * 2 / bandwidth * 1e6
    rate = 64 * 4096 * heads * (576 + 512) * 2 / time * 1e-6
    print(
        f"latent 64x4096, {heads} heads: {time:.1f} us, floor {floor:.1f}, share "
        f"{floor / time:.1%}, {rate:.0f} TFLOP/s",
        flush=True,
    )


def narrow_and_rope(bandwidth: float) -> None:
    layout = decode(64, 4096)
    q = torch.randn((64, 32, 128), dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    shape = (64 * 256, PAGE, 8, 128)
    bounds = {"max_requests": 64, "max_q_tokens": 64, "max_kv_pages": 64 * 256}
    pools = [
        tuple(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        for _ in range(2)
    ]
    plain = batch_attention(Kernel("causal", 128, 128, "bfloat16", "bfloat16"), (32, 8), **bounds)
    plain.plan(layout)
    alone = microseconds([lambda kv=kv: plain.run(q, *kv, out=out) for kv in pools])
    fused = batch_attention(Kernel("rope128", 128, 128, "bfloat16", "bfloat16"), (32, 8), **bounds)
    fused.plan(layout)
    frequencies = 10000.0 ** (-np.arange(64) / 64)
    fused.set_params(
        {"turn": torch.from_numpy(variants.rope_turns(frequencies)).cuda(), "magnitude": 1.0}
    )
    inside = microseconds([lambda kv=kv: fused.run(q, *kv, out=out) for kv in pools])
    fused.run(q, *pools[0], out=out)
    from_fused = out.clone()

    # Apart: cached keys are rotated into a pool of their own, which attention then reads.
    pages = torch.from_numpy(layout.levels[0].kv_indices).cuda().long()
    position = torch.empty((64 * 256, PAGE), dtype=torch.int32, device="cuda")
    counted = torch.arange(4096, dtype=torch.int32, device="cuda").view(-1, PAGE)
    position[pages] = counted.repeat(64, 1)
    angle = torch.arange(4096, dtype=torch.float64)[:, None] * torch.from_numpy(frequencies)
    table = torch.cat([angle.cos(), angle.sin()], 1).float().cuda()
    rotated = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    turned_q = torch.empty_like(q)
    last = torch.full((64,), 4095, dtype=torch.int32, device="cuda")

    def apart(kv: Any) -> None:
        rotate_keys(kv[0], rotated, position, table)
        rotate_keys(q.view(64, 1, 32, 128), turned_q.view(64, 1, 32, 128), last, table)
        plain.run(turned_q, rotated, kv[1], out=out)

    def copy(kv: Any) -> None:
        torch.add(kv[0], 0.0, out=rotated)
        plain.run(q, rotated, kv[1], out=out)

    outside = microseconds([lambda kv=kv: apart(kv) for kv in pools])
    apart(pools[0])
    error = (out.float() - from_fused.float()).norm() / out.float().norm()
    copied = microseconds([lambda kv=kv: copy(kv) for kv in pools])
    floor = 64 * 4096 * 8 * 256 * 2 / bandwidth * 1e6
    print(
        f"64x4096: plain {alone:.1f} us (floor {floor:.1f}), RoPE in the kernel {inside:.1f}, "
        f"rotated apart {outside:.1f}: {inside / outside - 1:+.0%} (by a plain copy of the keys "
        f"{copied:.1f}: {inside / copied - 1:+.0%}), outputs differ by {error:.1e}",
        flush=True,
    )
    narrow = batch_attention(
        Kernel("causal", 128, 128, "bfloat16", "float8_e4m3fn"), (32, 8), **bounds
    )
    narrow.plan(layout)
    small = [tuple(x.to(torch.float8_e4m3fn).view(torch.uint8) for x in kv) for kv in pools]
    time = microseconds([lambda kv=kv: narrow.run(q, *kv, out=out) for kv in small])
    print(f"64x4096, fp8 pool: {time:.1f} us, share {floor / 2 / time:.1%}", flush=True)


def shared_prefix() -> None:
    prefix, suffix, children = 32768, 64, 64
    q = torch.randn((children, 32, 128), dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    own = suffix // PAGE
    pages = prefix // PAGE + children * own
    k, v = (torch.randn((pages, PAGE, 8, 128), dtype=torch.bfloat16, device="cuda") for _ in "kv")
    ids = np.random.default_rng(1).permutation(pages).astype(np.int32)
    shared, rest = ids[: prefix // PAGE], ids[prefix // PAGE :]
    one = np.arange(children + 1, dtype=np.int32)
    last = np.full(children, PAGE, np.int32)
    kernel = Kernel("causal", 128, 128, "bfloat16", "bfloat16")
    flat_ids = np.concatenate(
        [np.concatenate([shared, rest[i * own : (i + 1) * own]]) for i in range(children)]
    )
    flat_layout = BlockSparseLayout.paged(
        one, one * (len(shared) + own), flat_ids.astype(np.int32), last, PAGE
    )
    bounds = {"max_requests": children, "max_q_tokens": children, "max_levels": 2}
    flat = batch_attention(kernel, (32, 8), max_kv_pages=len(flat_ids), **bounds)
    flat.plan(flat_layout)
    slow = microseconds([lambda: flat.run(q, k, v, out=out)], 5)
    expected = out.clone()
    levels = [
        PrefixLevel([0, children], [0, len(shared)], shared, [PAGE]),
        PrefixLevel(one, one * own, rest, last),
    ]
    layout = BlockSparseLayout.shared_prefix(one, levels, PAGE)
    step = batch_attention(kernel, (32, 8), max_kv_pages=pages, **bounds)
    step.plan(layout)
    fast = microseconds([lambda: step.run(q, k, v, out=out)])
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    print(
        f"prefix of {prefix}, {children} children: {fast:.1f} us, flat {slow:.1f}: "
        f"{slow / fast:.1f} x; difference {error:.1e}",
        flush=True,
    )


def main() -> None:
    bandwidth = read_bandwidth(FOLDER)
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s")
    for measure in (
        lambda: latent(bandwidth, 16),
        lambda: latent(bandwidth, 128),
        lambda: narrow_and_rope(bandwidth),
        shared_prefix,
    ):
        torch.cuda.empty_cache()
        try:
            measure()
        except Exception as error:  # the others are measured all the same
            print(f"failed: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
