# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The CUDA kernel's own source, run on a CPU by the emulator, against a float64 oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from emulate import Case, check, run
from harness.abi import PlanLibrary, PlanOptions
from harness.build import Compiled, ModuleSpec, build_all, build_emulated, build_plan
from harness.layouts import paged, shared_prefix

CAUSAL, FULL = "StandardVariant<true>", "StandardVariant<false>"
WINDOW_CAP = "StandardVariant<true, true, true>"
MODULES = {
    "bf16": ModuleSpec("BFloat16", 64, 64, CAUSAL, (16, 32, 64, 128)),
    "full": ModuleSpec("Float16", 64, 64, FULL, (16,)),
    "window": ModuleSpec("Float16", 80, 80, WINDOW_CAP, (16, 64)),
    "wide": ModuleSpec("BFloat16", 256, 256, CAUSAL, (16,)),
}


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda_emulation")


@pytest.fixture(scope="session")
def plans(build_folder: Path) -> PlanLibrary:
    return PlanLibrary(str(build_plan(build_folder)))


@pytest.fixture(scope="session")
def modules(build_folder: Path) -> dict[str, ctypes.CDLL]:
    jobs: list[Callable[[], Compiled]] = [
        lambda spec=spec: build_emulated(build_folder, spec) for spec in MODULES.values()
    ]
    compiled = build_all(jobs)
    assert all(c.log == "" for c in compiled), "\n".join(c.log for c in compiled)
    return {name: ctypes.CDLL(str(c.library)) for name, c in zip(MODULES, compiled, strict=True)}


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads"), [(1, 1), (4, 2), (6, 2), (7, 1)])
def test_decode_with_splits(modules, plans, page_size, num_qo_heads, num_kv_heads) -> None:
    rng = np.random.default_rng(page_size)
    batch, pages = paged([1, 1, 1, 1], [1, 300, 0, 77], page_size, rng)
    case = Case(batch, pages, num_qo_heads, num_kv_heads, 64)
    options = PlanOptions(tile_rows=16, num_workers=3, min_chunk=32, item_overhead=1)
    check(modules["bf16"], plans, case, options)


@pytest.mark.parametrize("tile_rows", [16, 32, 64, 128])
def test_prefill_tiles(modules, plans, tile_rows) -> None:
    rng = np.random.default_rng(tile_rows)
    batch, pages = paged([70, 3, 33], [70, 50, 120], 16, rng)
    options = PlanOptions(tile_rows=tile_rows, num_workers=4, min_chunk=64)
    check(modules["bf16"], plans, Case(batch, pages, 4, 2, 64), options)


def test_split_tiles_merge_in_plan_order(modules, plans) -> None:
    rng = np.random.default_rng(1)
    batch, pages = paged([20], [500], 3, rng)
    case = Case(batch, pages, 3, 1, 64)
    options = PlanOptions(tile_rows=32, num_workers=5, min_chunk=32, item_overhead=1)
    assert run(modules["bf16"], plans, case, options)[2].num_partials > 0
    check(modules["bf16"], plans, case, options)


def test_more_states_than_one_merge_step(modules, plans) -> None:
    rng = np.random.default_rng(2)
    batch, pages = paged([1], [700], 16, rng)
    options = PlanOptions(tile_rows=16, num_workers=50, min_chunk=16, item_overhead=0)
    case = Case(batch, pages, 2, 1, 64)
    assert run(modules["bf16"], plans, case, options)[2].num_partials > 32
    check(modules["bf16"], plans, case, options)


def test_fixed_chunks_make_results_independent_of_the_batch(modules, plans) -> None:
    rng = np.random.default_rng(3)
    batch, pages = paged([1, 1], [190, 333], 4, rng)
    case = Case(batch, pages, 4, 2, 64)
    options = PlanOptions(tile_rows=16, num_workers=3, fixed_chunk=64)
    both = run(modules["bf16"], plans, case, options)[0]
    level = batch.levels[0]
    first = int(level.kv_indptr[1])
    alone, _ = paged([1], [333], 4, rng)
    alone.levels[0].kv_indices = level.kv_indices[first:].copy()
    single = Case(alone, pages, 4, 2, 64)
    single.q, single.pool = case.q[1:].copy(), case.pool
    options = PlanOptions(tile_rows=16, num_workers=7, fixed_chunk=64)
    assert np.array_equal(both[1:], run(modules["bf16"], plans, single, options)[0])


def test_shared_prefix_levels(modules, plans) -> None:
    rng = np.random.default_rng(4)
    batch, pages = shared_prefix(96, [1, 2, 1], [5, 40, 0], 8, rng)
    options = PlanOptions(tile_rows=16, num_workers=4, min_chunk=32)
    check(modules["bf16"], plans, Case(batch, pages, 4, 2, 64), options)


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("sink", [0, 4])
def test_window_soft_cap_and_odd_head_dim(modules, plans, tile_rows, sink) -> None:
    rng = np.random.default_rng(5)
    batch, pages = paged([40, 1], [120, 200], 16, rng)
    case = Case(
        batch, pages, 4, 2, 80, "Float16", window_left=37, attention_sink=sink, soft_cap=20.0
    )
    options = PlanOptions(
        tile_rows=tile_rows, num_workers=4, window_left=37, attention_sink=sink, min_chunk=64
    )
    check(modules["window"], plans, case, options)


def test_rows_that_see_nothing(modules, plans) -> None:
    rng = np.random.default_rng(6)
    # More queries than keys: the first queries stand before every key.
    batch, pages = paged([30, 4], [10, 0], 16, rng)
    options = PlanOptions(tile_rows=16, num_workers=2)
    check(modules["bf16"], plans, Case(batch, pages, 2, 1, 64), options)


@pytest.mark.parametrize("sm_scale", [0.125, -0.3, 0.0])
def test_scales_of_any_sign(modules, plans, sm_scale) -> None:
    rng = np.random.default_rng(7)
    batch, pages = paged([1, 5], [100, 40], 16, rng)
    case = Case(batch, pages, 2, 1, 64, "Float16", causal=False, sm_scale=sm_scale)
    options = PlanOptions(tile_rows=16, num_workers=2, causal=False)
    check(modules["full"], plans, case, options)


def test_logits_of_large_magnitude(modules, plans) -> None:
    rng = np.random.default_rng(8)
    batch, pages = paged([1, 3], [150, 60], 16, rng)
    case = Case(batch, pages, 4, 2, 64, logits_scale=300.0)
    check(modules["bf16"], plans, case, PlanOptions(tile_rows=16, num_workers=3))


def test_tree_positions(modules, plans) -> None:
    rng = np.random.default_rng(9)
    batch, pages = paged([6], [46], 16, rng)
    batch.q_position = np.array([40, 41, 41, 42, 42, 45], np.int32)
    options = PlanOptions(tile_rows=16, num_workers=2)
    check(modules["bf16"], plans, Case(batch, pages, 2, 1, 64), options)


def test_head_dim_256(modules, plans) -> None:
    rng = np.random.default_rng(10)
    batch, pages = paged([1, 7], [90, 7], 16, rng)
    case = Case(batch, pages, 2, 1, 256)
    check(modules["wide"], plans, case, PlanOptions(tile_rows=16, num_workers=2))


def test_bad_operands_are_a_sentence(modules, plans) -> None:
    batch, pages = paged([1], [5], 16, np.random.default_rng(0))
    case = Case(batch, pages, 40, 1, 64)
    with pytest.raises(RuntimeError, match="cannot hold the 40 query heads"):
        run(modules["bf16"], plans, case, PlanOptions(tile_rows=16, num_workers=1))
    with pytest.raises(RuntimeError, match="no kernel was compiled for tile_rows = 48"):
        run(modules["bf16"], plans, case, PlanOptions(tile_rows=48, num_workers=1))
