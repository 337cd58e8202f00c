# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Attention on a real device, against a float64 oracle; graphs, poison and determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness.abi import PlanLibrary, PlanOptions, VariantParams
from harness.build import build_plan
from harness.device import DeviceCase, Module, compare
from harness.layouts import paged, shared_prefix
from modules import FOLDER, build

TOLERANCE = {"BFloat16": 5e-3, "Float16": 1e-3}


@pytest.fixture(scope="session")
def plans() -> PlanLibrary:
    return PlanLibrary(str(build_plan(FOLDER)))


@pytest.fixture(scope="session")
def modules() -> dict[str, Module]:
    return {name: Module(c.library) for name, c in build(["main", "half", "wide"]).items()}


def check(
    module: Module, plans: PlanLibrary, case: DeviceCase, tile_rows: int, **options: int
) -> None:
    workers = module.num_workers(tile_rows)
    case.plan(
        plans,
        PlanOptions(
            tile_rows=tile_rows,
            num_workers=workers,
            causal=case.causal,
            window_left=case.variant.window_left,
            attention_sink=case.variant.attention_sink,
            **options,
        ),
    )
    module.run(case.params, tile_rows, workers)
    torch.cuda.synchronize()
    error, lse_error = compare(case)
    assert error < TOLERANCE[case.element]
    assert lse_error < 1e-3
    first = case.o.clone()
    case.o.fill_(float("nan"))
    case.o_partial.fill_(float("nan"))
    case.lse_partial.fill_(float("nan"))
    module.run(case.params, tile_rows, workers)
    torch.cuda.synchronize()
    assert torch.equal(first, case.o)
    assert not case.tickets.any()


@pytest.mark.parametrize("page_size", [1, 16, 17])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (4, 4), (6, 2), (7, 1), (16, 1)])
def test_decode(modules, plans, page_size, heads, kv_heads) -> None:
    rng = np.random.default_rng(page_size)
    lens = [1, 15, 16, 17, 300, 0, 4096, 2049, 777]
    batch, pages = paged([1] * len(lens), lens, page_size, rng)
    check(modules["main"], plans, DeviceCase(batch, pages, heads, kv_heads, 128), 16)


@pytest.mark.parametrize("tile_rows", [16, 64, 128])
def test_prefill(modules, plans, tile_rows) -> None:
    rng = np.random.default_rng(tile_rows)
    qo, kv = [513, 1, 100, 64], [513, 3000, 1111, 0]
    batch, pages = paged(qo, kv, 16, rng)
    check(modules["main"], plans, DeviceCase(batch, pages, 12, 4, 128), tile_rows)


def test_decode_of_mixed_lengths(modules, plans) -> None:
    rng = np.random.default_rng(5)
    lens = rng.integers(1, 9000, 40).tolist()
    batch, pages = paged([1] * len(lens), lens, 16, rng)
    check(modules["main"], plans, DeviceCase(batch, pages, 32, 8, 128), 16)


def test_append_with_many_states(modules, plans) -> None:
    batch, pages = paged([40], [20000], 16, np.random.default_rng(0))
    check(modules["main"], plans, DeviceCase(batch, pages, 8, 1, 128), 64, min_chunk=64)


def test_shared_prefix(modules, plans) -> None:
    rng = np.random.default_rng(1)
    batch, pages = shared_prefix(2048, [1] * 30, list(range(0, 300, 10)), 16, rng)
    check(modules["main"], plans, DeviceCase(batch, pages, 32, 8, 128), 16)


@pytest.mark.parametrize("tile_rows", [16, 32])
def test_window_and_soft_cap(modules, plans, tile_rows) -> None:
    batch, pages = paged([200, 1], [900, 1500], 16, np.random.default_rng(2))
    variant = VariantParams(256, 4, 30.0)
    case = DeviceCase(batch, pages, 8, 2, 64, "Float16", variant=variant)
    check(modules["half"], plans, case, tile_rows)


@pytest.mark.parametrize("tile_rows", [16, 64])
def test_head_dim_256(modules, plans, tile_rows) -> None:
    batch, pages = paged([1, 70], [1000, 500], 16, np.random.default_rng(3))
    check(modules["wide"], plans, DeviceCase(batch, pages, 8, 4, 256), tile_rows)


def test_one_graph_serves_every_plan(modules, plans) -> None:
    """Replays over plans of other lengths, workspaces poisoned between, equal eager runs."""
    rng = np.random.default_rng(4)
    module, workers = modules["main"], modules["main"].num_workers(16)
    options = PlanOptions(tile_rows=16, num_workers=workers)
    batch, pages = paged([1] * 8, [2000] * 8, 16, rng)
    case = DeviceCase(batch, pages, 32, 8, 128)
    bounds_plan = case.plan(plans, options)
    case.o_partial = torch.empty(
        (bounds_plan.max_partials, 32, 128), dtype=torch.float32, device="cuda"
    )
    case.lse_partial = torch.empty((bounds_plan.max_partials, 32), device="cuda")
    case.params.o_partial = case.o_partial.data_ptr()
    case.params.lse_partial = case.lse_partial.data_ptr()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module.run(case.params, 16, workers)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        module.run(case.params, 16, workers)
    for _ in range(20):
        lens = rng.integers(0, 2001, 8).tolist()
        step, _ = paged([1] * 8, lens, 16, rng)
        case.batch = step
        step_plan = plans.plan(step, 32, 8, options, bounds_plan.bounds)
        case.plan_buffer.copy_(torch.from_numpy(step_plan.buffer))
        case.o.fill_(float("nan"))
        case.o_partial.fill_(float("nan"))
        case.lse_partial.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        replayed = case.o.clone()
        error, lse_error = compare(case)
        assert error < 5e-3 and lse_error < 1e-3
        case.o.fill_(float("nan"))
        module.run(case.params, 16, workers)
        torch.cuda.synchronize()
        assert torch.equal(replayed, case.o)
