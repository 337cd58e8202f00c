# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Variants, pools and head sizes on a real device, through BatchAttention on torch's CUDA tensors,
by the definitions and at the tolerances of the core."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness.build import ROOT
from harness.runtime import load as load_runtime
from kernels import ALL, KERNELS, SHIPPED, Kernel, batch_attention

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "core"))

import oracle
from batches import TOLERANCE, PagedBatch
from variant_definitions import DEFINITIONS, Grid, Sizes, attend

from tvm_flashinfer.attention import BatchAttention
from tvm_flashinfer.layout import BlockSparseLayout

load_runtime()

#: A prefill, decodes that are split and not, one key, nothing to see.
PAIRS = [(150, 400), (1, 3000), (1, 1), (3, 0), (40, 41)]
COMPILED = {kernel.name for kernel in ALL if (KERNELS / f"{kernel.name}.so").is_file()}
pytestmark = pytest.mark.skipif(not COMPILED, reason="no kernels: scripts/gpu_bundle.sh")


@pytest.fixture
def make() -> Callable[..., BatchAttention]:
    """A BatchAttention of a compiled kernel."""

    def made(kernel: Kernel, heads: tuple[int, int], **options: Any) -> BatchAttention:
        if kernel.name not in COMPILED:
            pytest.skip(f"{kernel.name} is not in the bundle")
        return batch_attention(kernel, heads, **options)

    return made


def on_device(params: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value).cuda() if isinstance(value, np.ndarray) else value
        for name, value in params.items()
    }


@pytest.mark.parametrize(("heads", "page_size"), [((6, 2), 16), ((7, 1), 5), ((4, 4), 1)])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_variant(make: Any, name: str, heads: tuple[int, int], page_size: int) -> None:
    definition = DEFINITIONS[name]
    batch = PagedBatch(PAIRS, page_size, heads, (64, 64), "float16", seed=page_size)
    sizes = Sizes(len(PAIRS), len(batch.q), heads[0], max(keys for _, keys in PAIRS), 64)
    params = definition.params(np.random.default_rng(11), sizes)
    step = make(
        Kernel(name),
        heads,
        max_requests=len(PAIRS),
        max_q_tokens=len(batch.q),
        max_kv_pages=batch.layout.num_pages,
    )
    grids = []
    for request, (queries, keys) in enumerate(PAIRS):
        first = sum(n for n, _ in PAIRS[:request])
        grids.append(Grid(request, first, queries, keys, heads[0]))
    step.plan(batch.layout.at_positions(np.concatenate([g.q[0, :, 0] for g in grids])))
    tensors = [x.cuda() for x in batch.tensors()]
    actual = step.run(*tensors, params=on_device(params), return_lse=definition.softmax)
    o, lse = actual if definition.softmax else (actual, None)
    want = [
        attend(definition, g, batch.q[g.rows], batch.k[r], batch.v[r], params)
        for r, g in enumerate(grids)
    ]
    want_o = np.concatenate([w[0] for w in want])
    oracle.assert_close(o.float().cpu().numpy(), want_o, TOLERANCE["float16"])
    if lse is not None:
        want_lse = np.concatenate([w[1] for w in want])
        oracle.assert_close(lse.cpu().numpy(), want_lse, 1e-4, "lse")
    again = step.run(*tensors, return_lse=definition.softmax)
    assert torch.equal(o, again[0] if definition.softmax else again)


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "int8"])
def test_narrow_pools(make: Any, kv_dtype: str) -> None:
    """Stored by the append kernel, attended by the attention kernel."""
    heads, page_size, pairs = (6, 2), 16, [(60, 130), (1, 900), (2, 0)]
    batch = PagedBatch(pairs, page_size, heads, (64, 64), "float16")
    step = make(
        Kernel("channel_scales", kv_dtype=kv_dtype),
        heads,
        max_requests=3,
        max_q_tokens=2048,
        max_kv_pages=batch.layout.num_pages,
    )
    rng = np.random.default_rng(3)
    unit = 0.02 if kv_dtype == "int8" else 0.5
    scales = [(unit * (1 + rng.random((2, 64)))).astype(np.float32) for _ in "kv"]
    step.set_params(on_device(dict(zip(("k_scale", "v_scale"), scales, strict=True))))
    shape = (batch.pool_pages, page_size, 2, 64)
    pools = [torch.full(shape, 0x7F, dtype=torch.uint8, device="cuda") for _ in "kv"]
    tables, slots = batch.layout.levels[0], []
    for request, (_, keys) in enumerate(pairs):
        own = tables.kv_indices[tables.kv_indptr[request] :]
        slots += [int(own[t // page_size]) * page_size + t % page_size for t in range(keys)]
    new = [
        torch.from_numpy(np.concatenate([x for x in side if len(x)]).astype(np.float16)).cuda()
        for side in (batch.k, batch.v)
    ]
    step.append(*new, np.asarray(slots, np.int32), *pools)
    for side, scale in zip((batch.k, batch.v), scales, strict=True):
        for r, x in enumerate(side):
            exact = torch.from_numpy(x.astype(np.float16).astype(np.float32) / scale)
            if kv_dtype == "int8":
                stored = exact.round().clamp(-128, 127)
            else:
                stored = exact.to(torch.float8_e4m3fn).float()
            side[r] = stored.numpy() * scale
    step.plan(batch.layout)
    o, lse = step.run(batch.tensors()[0].cuda(), *pools, return_lse=True)
    want_o, want_lse = batch.expected(causal=True)
    oracle.assert_close(o.float().cpu().numpy(), want_o, TOLERANCE["float16"])
    oracle.assert_close(lse.cpu().numpy(), want_lse, 1e-3, "lse")


@pytest.mark.parametrize("heads", [16, 5, 128])
def test_latent_attention(make: Any, heads: int) -> None:
    """DeepSeek's 576 and 512: values start their keys; 128 heads are cut into parts."""
    pairs = [(1, 700), (70, 90), (1, 0), (1, 64)]
    batch = PagedBatch(pairs, 16, (heads, 1), (576, 512), "bfloat16")
    for r, k in enumerate(batch.k):
        batch.v[r] = k[..., :512]
    q, k, _ = (x.cuda() for x in batch.tensors())
    step = make(
        Kernel("causal", 576, 512, "bfloat16", "bfloat16"),
        (heads, 1),
        max_requests=4,
        max_q_tokens=len(batch.q),
        max_kv_pages=batch.layout.num_pages,
    )
    step.plan(batch.layout)
    o, lse = step.run(q, k, k[..., :512], return_lse=True)
    want_o, want_lse = batch.expected(causal=True)
    oracle.assert_close(o.float().cpu().numpy(), want_o, TOLERANCE["bfloat16"])
    oracle.assert_close(lse.cpu().numpy(), want_lse, 1e-3, "lse")


@pytest.mark.parametrize("page_size", [1, 2, 7, 16, 64])
def test_rope_in_the_kernel_and_page_sizes(make: Any, page_size: int) -> None:
    from tvm_flashinfer import variants

    pairs = [(70, 300), (1, 2000), (1, 1)]
    batch = PagedBatch(pairs, page_size, (8, 2), (128, 128), "bfloat16")
    step = make(
        Kernel("rope128", 128, 128, "bfloat16", "bfloat16"),
        (8, 2),
        max_requests=3,
        max_q_tokens=len(batch.q),
        max_kv_pages=batch.layout.num_pages,
    )
    frequencies = 10000.0 ** (-np.arange(64) / 64)
    params = {"turn": variants.rope_turns(frequencies), "magnitude": 1.0}

    def rotated(x: np.ndarray, at: np.ndarray) -> np.ndarray:
        angle = at[:, None, None] * frequencies
        a, b = x[..., :64].astype(np.float64), x[..., 64:].astype(np.float64)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    step.plan(batch.layout)
    actual = step.run(*(x.cuda() for x in batch.tensors()), params=on_device(params))
    begin = 0
    for r, (n, m) in enumerate(pairs):
        batch.q[begin : begin + n] = rotated(batch.q[begin : begin + n], m - n + np.arange(n))
        batch.k[r] = rotated(batch.k[r], np.arange(m))
        begin += n
    want, _ = batch.expected(causal=True)
    oracle.assert_close(actual.float().cpu().numpy(), want, TOLERANCE["bfloat16"])


def test_a_captured_run_replays_later_plans(make: Any) -> None:
    """Sinks and outputs under capture, split keys included; equal to eager bit for bit."""
    kernel, heads = Kernel("learned_sink_window"), (8, 2)
    rng = np.random.default_rng(0)
    layouts = []
    for _ in range(5):
        lens = rng.integers(1, 2000, 8)
        pages = -(-lens // 16)
        indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        ids = rng.permutation(1024)[: indptr[-1]].astype(np.int32)
        last = (lens - (pages - 1) * 16).astype(np.int32)
        layouts.append(BlockSparseLayout.paged(np.arange(9, dtype=np.int32), indptr, ids, last, 16))
    step = make(kernel, heads, max_requests=8, max_q_tokens=8, max_kv_pages=1024)
    q = torch.randn((8, 8, 64), dtype=torch.float16, device="cuda")
    k, v = (torch.randn((1024, 16, 2, 64), dtype=torch.float16, device="cuda") for _ in "kv")
    out = torch.empty_like(q)
    params = on_device({"sink": rng.standard_normal(8).astype(np.float32), "window_left": 1500})
    step.plan(layouts[0])
    step.run(q, k, v, params=params, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(q, k, v, out=out)
    for layout in layouts:
        step.plan(layout)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        assert torch.isfinite(replayed).all()
        step.run(q, k, v, out=out)
        torch.cuda.synchronize()
        assert torch.equal(replayed, out)
