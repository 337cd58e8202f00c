# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Every variant, transform and pool of the core on the CUDA kernels' own source, on a CPU, through
the runtime that launches them on a GPU, against the definitions that the CPU's kernels meet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

from batches import TOLERANCE, PagedBatch
from tables import emulated_table
from variant_checks import check_definition
from variant_definitions import DEFINITIONS, EVERYTHING, Definition, Params

from tvm_flashinfer import attention as attention_module
from tvm_flashinfer import variants
from tvm_flashinfer.attention import BatchAttention
from tvm_flashinfer.jit import AttentionSpec
from tvm_flashinfer.rope import RopeConfig
from tvm_flashinfer.variant import Variant

#: A prefill of two tiles, a long decode that is split, one key, nothing to see.
PAIRS = [(9, 40), (1, 300), (1, 1), (3, 0)]
#: Run by default: a mask tensor, logits that know positions, sinks, outputs, no softmax.
QUICK = {"custom_mask", "alibi", "learned_sink_window", "gated", "sigmoid"}


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variant_tables")


class Emulated:
    """BatchAttention whose kernels run on the emulator, in the query tiles that are given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles: tuple[int, ...] = (16,)
        self.arch = "80"
        monkeypatch.setattr(
            attention_module,
            "_kernel_of",
            lambda spec, *_: emulated_table(folder, spec, self.tiles, arch=self.arch),
        )


@pytest.fixture
def emulated(tables: Path, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(tables, monkeypatch)


def made(batch: PagedBatch, variant: Variant | None, **options: Any) -> BatchAttention:
    step = BatchAttention(
        *batch.heads,
        *batch.dims,
        dtype=batch.dtype,
        variant=variant,
        max_requests=len(batch.pairs),
        max_q_tokens=len(batch.q),
        max_kv_pages=batch.layout.num_pages,
        num_workers=3,
        **options,
    )
    return step


def check(
    variant: Variant,
    definition: Definition,
    *,
    heads: tuple[int, int] = (6, 2),
    dim: int = 32,
    dtype: str = "float16",
    page_size: int = 5,
) -> None:
    batch = PagedBatch(PAIRS, page_size, heads, (dim, dim), dtype, seed=dim)
    check_definition(lambda b: made(b, variant), batch, definition, lse_tolerance=1e-4)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_shipped_variant(emulated: Emulated, name: str) -> None:
    check(variants.SHIPPED[name], DEFINITIONS[name])


@pytest.mark.heavy
@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_every_variant_and_tile(emulated: Emulated, name: str, tile: int) -> None:
    emulated.tiles = (tile,)
    at = sorted(DEFINITIONS).index(name)
    check(
        variants.SHIPPED[name],
        DEFINITIONS[name],
        heads=[(4, 4), (6, 2), (7, 1)][at % 3],
        dim=[32, 64, 80, 128][at % 4],
        dtype=["float16", "bfloat16"][at % 2],
        page_size=[1, 5, 16, 64][at % 4],
    )


@pytest.mark.parametrize("climb", [0.3, 4.0, 60.0])
@pytest.mark.parametrize(("arch", "tile"), [("80", 16), ("90a", 128)])
def test_logits_that_climb(emulated: Emulated, arch: str, tile: int, climb: float) -> None:
    """By `climb` in 64 tokens: a running maximum never follows, or sometimes, or always."""
    emulated.tiles, emulated.arch = (tile,), arch
    lengths = [(40, 300), (1, 300)]
    batch = PagedBatch(lengths, 8, (4, 2), (64, 64), "float16", scale=0.05, climb=climb)
    step = made(batch, None)
    step.plan(batch.layout)
    close(step.run(*batch.tensors(), return_lse=True), batch.expected(causal=True), "float16")


# --- transforms ---------------------------------------------------------------------------------


def positions(queries: int, keys: int) -> np.ndarray:
    return keys - queries + np.arange(queries)


def expected(batch: PagedBatch, query: Any, key: Any, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """Oracle of a causal batch whose tensors go through functions of (x, positions, request)."""
    outs, sums, begin = [], [], 0
    for r, (n, m) in enumerate(batch.pairs):
        o, lse = oracle.attend(
            query(batch.q[begin : begin + n].astype(np.float64), positions(n, m), r),
            key(batch.k[r].astype(np.float64), np.arange(m), r),
            value(batch.v[r].astype(np.float64), np.arange(m), r),
            batch.dims[0] ** -0.5,
            oracle.bottom_right(n, m),
        )
        outs.append(o)
        sums.append(lse)
        begin += n
    return np.concatenate(outs), np.concatenate(sums)


def unchanged(x: np.ndarray, *_: Any) -> np.ndarray:
    return x


def run(step: BatchAttention, batch: PagedBatch, params: Params, *pools: Any) -> Any:
    step.plan(batch.layout)
    q, *own = batch.tensors()
    return step.run(q, *(pools or own), params=params, return_lse=True)


def close(actual: Any, want: tuple[np.ndarray, np.ndarray], dtype: str) -> None:
    o, lse = actual
    oracle.assert_close(o.float().numpy(), want[0], TOLERANCE[dtype])
    oracle.assert_close(lse.numpy(), want[1], TOLERANCE[dtype] / 4, "lse")


TILES = [16, pytest.param(64, marks=pytest.mark.heavy), pytest.param(32, marks=pytest.mark.heavy)]


@pytest.mark.parametrize("tile", TILES)
def test_every_transform_at_once(emulated: Emulated, tile: int) -> None:
    emulated.tiles = (tile,)
    d_qk, d_vo = 48, 64
    batch = PagedBatch(PAIRS, 5, (6, 2), (d_qk, d_vo), "float16")
    r = np.random.default_rng(1)
    a = r.standard_normal((6, d_vo), dtype=np.float32)
    b = r.standard_normal(400, dtype=np.float32)
    c = r.standard_normal(len(PAIRS)).astype(np.float16)
    after = np.minimum(np.arange(d_qk) + 1, d_qk - 1)  # past the end reads the end
    want_o, want_lse = expected(
        batch,
        lambda x, at, r: x * a[:, :d_qk] + x[..., :1] * float(c[r]),
        lambda x, at, r: x + x[..., after] * b[at][:, None, None] + a[:2, :d_qk],
        lambda x, at, r: x * b[at][:, None, None] - x[..., 3:4],
    )
    rows = np.arange(len(batch.q))
    want_o = want_o[..., np.arange(d_vo) ^ 1] * a[:, :d_vo] + b[rows][:, None, None]
    actual = run(made(batch, EVERYTHING), batch, {"a": a, "b": b, "c": c})
    # Keys and values are rounded to the operand type after their transforms.
    close(actual, (want_o, want_lse), "bfloat16")


def rotated(x: np.ndarray, at: np.ndarray, config: RopeConfig) -> np.ndarray:
    frequencies, magnitude = config.resolve(x.shape[-1])
    dim = 2 * len(frequencies)
    angle = at[:, None, None] * frequencies.astype(np.float64)
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    out = x.copy()
    first = slice(0, dim, 2) if config.interleaved else slice(0, dim // 2)
    second = slice(1, dim, 2) if config.interleaved else slice(dim // 2, dim)
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    "config",
    [
        RopeConfig(rotary_dim=24),
        pytest.param(RopeConfig(interleaved=True), marks=pytest.mark.heavy),
    ],
)
def test_rope_in_the_kernel(emulated: Emulated, tile: int, config: RopeConfig) -> None:
    emulated.tiles = (tile,)
    batch = PagedBatch(PAIRS, 16, (4, 2), (32, 32), "float16")
    frequencies, magnitude = config.resolve(32)
    variant = variants.rope(2 * len(frequencies), interleaved=config.interleaved)
    params = {"turn": variants.rope_turns(frequencies), "magnitude": magnitude}
    want = expected(
        batch,
        lambda x, at, _: rotated(x, at, config),
        lambda x, at, _: rotated(x, at, config),
        unchanged,
    )
    close(run(made(batch, variant), batch, params), want, "float16")


@pytest.mark.parametrize(
    ("dim", "made_variant"),
    [
        (128, lambda: variants.rope(128)),  # partners half a head away
        (64, lambda: variants.rope(32)),  # the next fragment; the rest alone
        (32, lambda: variants.rope(16)),  # in the same fragment
        (32, lambda: variants.rope(32, interleaved=True)),  # neighbours
    ],
    ids=["half", "partial", "fragment", "neighbours"],
)
def test_keys_in_registers(emulated: Emulated, dim: int, made_variant: Any) -> None:
    """Decode rotates keys as fragments, where an element's partner is in the same lane."""
    variant = made_variant()
    rotary = min(int(variant.name.split("rope")[1].split("_")[0]), dim)
    config = RopeConfig(rotary_dim=rotary, interleaved=variant.name.endswith("gptj"))
    batch = PagedBatch([(1, 300), (1, 1), (2, 40), (1, 0)], 16, (6, 2), (dim, dim), "bfloat16")
    frequencies, magnitude = config.resolve(dim)
    params = {"turn": variants.rope_turns(frequencies), "magnitude": magnitude}
    want = expected(
        batch,
        lambda x, at, _: rotated(x, at, config),
        lambda x, at, _: rotated(x, at, config),
        unchanged,
    )
    close(run(made(batch, variant), batch, params), want, "bfloat16")


NARROW = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int8": np.int8,
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("scales", ["channel", pytest.param("token", marks=pytest.mark.heavy)])
@pytest.mark.parametrize(
    "kv_dtype",
    ["float8_e4m3fn", "int8", pytest.param("float8_e5m2", marks=pytest.mark.heavy)],
)
def test_narrow_pools(emulated: Emulated, kv_dtype: str, scales: str, tile: int) -> None:
    """Stored by the append kernel, attended by the attention kernel."""
    emulated.tiles = (tile,)
    batch = PagedBatch(PAIRS, 4, (4, 2), (32, 48), "float16")
    variant = variants.quantized(scales)
    step = made(batch, variant, kv_dtype=kv_dtype)
    pages = batch.pool_pages
    r = np.random.default_rng(3)
    shapes = [(2, d) if scales == "channel" else (pages * 4, 2) for d in batch.dims]
    unit = 0.02 if kv_dtype == "int8" else 0.5
    scale = [(unit * (1 + r.random(s))).astype(np.float32) for s in shapes]
    params = {"k_scale": scale[0], "v_scale": scale[1]}
    pools = [torch.zeros((pages, 4, 2, d), dtype=torch.uint8) for d in batch.dims]
    step.set_params(params)
    slots, tables = [], batch.layout.levels[0]
    for request, (_, keys) in enumerate(batch.pairs):
        own = tables.kv_indices[tables.kv_indptr[request] :]
        slots += [int(own[t // 4]) * 4 + t % 4 for t in range(keys)]
    slots = np.asarray(slots, np.int32)
    new = [
        torch.from_numpy(np.concatenate([x for x in side if len(x)]).astype(np.float16))
        for side in (batch.k, batch.v)
    ]
    step_size = len(batch.q)
    for begin in range(0, len(slots), step_size):
        rows = slice(begin, begin + step_size)
        step.append(new[0][rows], new[1][rows], slots[rows].copy(), *pools)

    def stored(side: int) -> Any:
        narrow = NARROW[kv_dtype]

        def of(x: np.ndarray, at: np.ndarray, request: int) -> np.ndarray:
            own = tables.kv_indices[tables.kv_indptr[request] :]
            place = np.array([int(own[t // 4]) * 4 + t % 4 for t in at], np.int64)
            by = scale[side] if scales == "channel" else scale[side][place][:, :, None]
            exact = (x.astype(np.float16).astype(np.float32) / by).astype(np.float32)
            if kv_dtype == "int8":
                exact = np.clip(np.rint(exact), -128, 127)
            return exact.astype(narrow).astype(np.float64) * by

        return of

    want = expected(batch, unchanged, stored(0), stored(1))
    close(run(step, batch, params, *pools), want, "float16")


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    ("dims", "tile"), [((64, 64), 16), ((128, 96), 16), pytest.param((64, 64), 64)]
)
def test_pools_that_are_only_widened(
    emulated: Emulated, kv_dtype: str, dims: tuple[int, int], tile: int
) -> None:
    """Without a transform, decode widens 8-bit floats in registers."""
    emulated.tiles = (tile,)
    batch = PagedBatch(PAIRS, 4, (6, 2), dims, "bfloat16")
    narrow = getattr(torch, kv_dtype)
    for side in (batch.k, batch.v):
        side[:] = [torch.from_numpy(x).to(narrow).float().numpy() for x in side]
    q, *pools = batch.tensors()
    step = made(batch, None, kv_dtype=kv_dtype)
    step.plan(batch.layout)
    out = step.run(q, *(x.to(narrow).view(torch.uint8) for x in pools), return_lse=True)
    close(out, batch.expected(causal=True), "bfloat16")


def test_queries_beyond_half_precision(emulated: Emulated) -> None:
    """Products with widened floats are of half precision, which such rows are divided for."""
    emulated.tiles = (16,)
    batch = PagedBatch(PAIRS, 4, (6, 2), (64, 64), "bfloat16")
    for side in (batch.k, batch.v):
        side[:] = [torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy() for x in side]
    q, *pools = batch.tensors()
    powers = torch.tensor([20, 0, 0, 100, 20, 0])
    step = made(batch, None, kv_dtype="float8_e4m3fn")
    step.plan(batch.layout)
    want = batch.expected(causal=True)
    for power in powers.unique().tolist():
        o, lse = step.run(
            (q * 2.0 ** powers[:, None]).to(q.dtype),
            *(x.to(torch.float8_e4m3fn).view(torch.uint8) for x in pools),
            sm_scale=64**-0.5 * 2.0**-power,
            return_lse=True,
        )
        heads = (powers == power).numpy()
        close((o[:, heads], lse[:, heads]), tuple(x[:, heads] for x in want), "bfloat16")


# --- latent attention ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "tile", "heads", "page_size", "head_dim_qk"),
    [
        ("80", 16, 5, 16, 576),
        ("90a", 16, 5, 16, 576),
        ("90a", 64, 128, 8, 576),
        pytest.param("80", 16, 40, 16, 576, marks=pytest.mark.heavy),
        pytest.param("80", 64, 40, 16, 576, marks=pytest.mark.heavy),
        pytest.param("90a", 64, 40, 16, 576, marks=pytest.mark.heavy),
        pytest.param("90a", 64, 40, 5, 576, marks=pytest.mark.heavy),
        pytest.param("90a", 64, 40, 16, 512, marks=pytest.mark.heavy),
    ],
)
def test_values_that_start_their_keys(
    emulated: Emulated, arch: str, tile: int, heads: int, page_size: int, head_dim_qk: int
) -> None:
    """DeepSeek's 576 and 512; heads above a tile's rows are cut into parts. On sm_90a by warpgroups
    where pages are copied in boxes; pages of 5 tokens are not. Their steps have 48 tokens: the
    tile that begins with position 46 of 56 has masks in the steps of either warpgroup."""
    emulated.tiles, emulated.arch = (tile,), arch
    pairs = [(2, 70), (1, 150), (1, 0), (16, 56), (1, 9)]
    batch = PagedBatch(pairs, page_size, (heads, 1), (head_dim_qk, 512), "bfloat16")
    for r, k in enumerate(batch.k):
        batch.v[r] = k[..., :512]
    q, k, _ = batch.tensors()
    step = made(batch, None)
    step.plan(batch.layout)
    close(step.run(q, k, k[..., :512], return_lse=True), batch.expected(causal=True), "bfloat16")


@pytest.mark.heavy
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("tile", [16, 64])
def test_wide_heads(emulated: Emulated, tile: int, kv_dtype: str) -> None:
    """Values of their own, and a pool that is converted."""
    emulated.tiles = (tile,)
    batch = PagedBatch([(20, 60), (1, 90)], 16, (4, 2), (320, 384), "bfloat16")
    narrow = torch.float8_e4m3fn
    if kv_dtype != "bfloat16":
        for side in (batch.k, batch.v):
            side[:] = [torch.from_numpy(x).to(narrow).float().numpy() for x in side]
    q, *pools = batch.tensors()
    if kv_dtype != "bfloat16":
        pools = [x.to(narrow).view(torch.uint8) for x in pools]
    step = made(batch, None, kv_dtype=kv_dtype)
    step.plan(batch.layout)
    close(step.run(q, *pools, return_lse=True), batch.expected(causal=True), "bfloat16")


@pytest.mark.heavy
def test_wide_heads_under_a_variant(emulated: Emulated) -> None:
    for name in ("learned_sink_window", "gated", "sigmoid"):
        check(variants.SHIPPED[name], DEFINITIONS[name], dim=320, heads=(6, 2), dtype="bfloat16")


# --- what a user may get wrong ------------------------------------------------------------------


def test_specs_without_a_kernel_are_named() -> None:
    from tvm_flashinfer import jit_cuda

    for spec, words in (
        (AttentionSpec("float32", "float32", 64, 64), "q_dtype is 'float32'"),
        (AttentionSpec("float16", "float16", 72, 64), "head_dim_qk is 72"),
        (AttentionSpec("float16", "float16", 576, 528), "head_dim_vo is 528"),
        (AttentionSpec("float16", "int4", 48, 64), "head_dim_qk is 48"),
    ):
        with pytest.raises(ValueError, match=words):
            jit_cuda.kernel_source(spec, "table")
