# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The sm_90a kernel of warpgroups, run on a CPU by the emulator, against a float64 oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from emulate import Case, check
from harness.abi import PlanLibrary, PlanOptions
from harness.build import Compiled, ModuleSpec, build_all, build_emulated, build_plan
from harness.layouts import paged, shared_prefix

MODULES = {
    "main": ModuleSpec("BFloat16", 128, 128, "StandardVariant<true>", (128,)),
    "full": ModuleSpec("Float16", 64, 64, "StandardVariant<false>", (128,)),
    "window": ModuleSpec("Float16", 64, 64, "StandardVariant<true, true, true>", (128,)),
}


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warpgroups")


@pytest.fixture(scope="module")
def plans(build_folder: Path) -> PlanLibrary:
    return PlanLibrary(str(build_plan(build_folder)))


@pytest.fixture(scope="module")
def modules(build_folder: Path) -> dict[str, ctypes.CDLL]:
    jobs: list[Callable[[], Compiled]] = [
        lambda spec=spec: build_emulated(build_folder, spec, "90a") for spec in MODULES.values()
    ]
    compiled = build_all(jobs)
    assert all(c.log == "" for c in compiled), "\n".join(c.log for c in compiled)
    return {name: ctypes.CDLL(str(c.library)) for name, c in zip(MODULES, compiled, strict=True)}


def options(workers: int, **changes: object) -> PlanOptions:
    return PlanOptions(tile_rows=128, num_workers=workers, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads"), [(2, 2), (4, 1), (3, 1)])
def test_prefill(modules, plans, page_size, num_qo_heads, num_kv_heads) -> None:
    rng = np.random.default_rng(page_size)
    batch, pages = paged([150, 3, 1, 33], [150, 300, 0, 400], page_size, rng)
    case = Case(batch, pages, num_qo_heads, num_kv_heads, 128)
    check(modules["main"], plans, case, options(3))


@pytest.mark.parametrize("page_size", [1, 16])
def test_chunks_that_end_anywhere_in_a_step(modules, plans, page_size) -> None:
    lens = [1, 7, 8, 63, 64, 65, 72, 120, 127, 128, 129, 192, 200]
    batch, pages = paged([2] * len(lens), lens, page_size, np.random.default_rng(9))
    check(modules["main"], plans, Case(batch, pages, 4, 2, 128), options(3))


def test_split_tiles_are_merged(modules, plans) -> None:
    batch, pages = paged([40], [900], 16, np.random.default_rng(1))
    case = Case(batch, pages, 3, 1, 128)
    plan = check(modules["main"], plans, case, options(5, min_chunk=32, item_overhead=1))
    assert plan.num_partials > 0


def test_shared_prefix_levels(modules, plans) -> None:
    batch, pages = shared_prefix(200, [10, 2, 40], [5, 40, 0], 8, np.random.default_rng(4))
    check(modules["main"], plans, Case(batch, pages, 4, 2, 128), options(4, min_chunk=32))


@pytest.mark.parametrize("sink", [0, 4])
def test_window_and_soft_cap(modules, plans, sink) -> None:
    batch, pages = paged([90, 1], [500, 300], 16, np.random.default_rng(5))
    window = {"window_left": 137, "attention_sink": sink}
    case = Case(batch, pages, 4, 2, 64, "Float16", soft_cap=20.0, **window)
    check(modules["window"], plans, case, options(4, min_chunk=64, **window))


def test_rows_that_see_nothing_and_large_logits(modules, plans) -> None:
    # More queries than keys: the first queries stand before every key.
    batch, pages = paged([130, 4], [10, 0], 16, np.random.default_rng(6))
    check(modules["main"], plans, Case(batch, pages, 2, 1, 128), options(2))
    batch, pages = paged([80], [400], 16, np.random.default_rng(8))
    check(modules["main"], plans, Case(batch, pages, 4, 2, 128, logits_scale=300.0), options(3))


@pytest.mark.parametrize("sm_scale", [0.125, -0.3, 0.0])
def test_scales_of_any_sign(modules, plans, sm_scale) -> None:
    batch, pages = paged([50], [300], 16, np.random.default_rng(7))
    case = Case(batch, pages, 2, 1, 64, "Float16", causal=False, sm_scale=sm_scale)
    check(modules["full"], plans, case, options(2, causal=False))
