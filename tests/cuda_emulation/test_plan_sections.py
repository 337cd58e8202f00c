# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Queues of prefill go section by section through the batch, so that its KV stays in the cache."""

from __future__ import annotations

import numpy as np
import pytest
from harness.abi import Plan, PlanLibrary, PlanOptions
from harness.build import build_plan
from harness.layouts import paged

WORKERS, HEADS = 24, 4


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> PlanLibrary:
    return PlanLibrary(str(build_plan(tmp_path_factory.mktemp("plan_sections"))))


def plan(plans: PlanLibrary, qo: list[int], kv: list[int], section_kv: int) -> Plan:
    batch, _ = paged(qo, kv, 16, np.random.default_rng(0))
    options = PlanOptions(tile_rows=64, num_workers=WORKERS, section_kv=section_kv)
    return plans.plan(batch, 2 * HEADS, HEADS, options)


def test_workers_are_in_one_section_at_a_time(plans: PlanLibrary) -> None:
    lens = [1024, 700, 1024, 900, 1024, 512, 1024, 800]
    section_kv = 2048 * HEADS
    sectioned, plain = (plan(plans, lens, lens, n) for n in (section_kv, 0))
    assert sorted(map(tuple, sectioned.items)) == sorted(map(tuple, plain.items))
    assert sectioned.num_partials == 0
    assert sectioned.imbalance <= 1.02
    before = np.cumsum([0, *lens[:-1]])  # KV of the rows before a row
    indptr = sectioned.worker_indptr
    for worker in range(WORKERS):
        queue = sectioned.items[indptr[worker] : indptr[worker + 1]]
        sections = before[queue[:, 0]] * HEADS // section_kv
        assert np.all(np.diff(sections) >= 0)
        cost = (queue[:, 4] + 32) * np.maximum(16, queue[:, 2] * 2)  # by KV tokens and packed rows
        for section in np.unique(sections):  # costliest first within one
            assert np.all(np.diff(cost[sections == section]) <= 0)
    reordered = plain.items[plain.worker_indptr[0] : plain.worker_indptr[1]]
    assert np.any(np.diff(before[reordered[:, 0]] * HEADS // section_kv) < 0)


def test_a_last_section_too_small_to_even_out_is_not_kept(plans: PlanLibrary) -> None:
    lens = [64] * 40 + [1024]  # one long request, and the section it closes is its own
    sectioned, plain = (plan(plans, lens, lens, n) for n in (16, 0))
    assert sectioned.imbalance <= max(1.05, plain.imbalance)


def test_decode_is_not_divided(plans: PlanLibrary) -> None:
    lens = np.random.default_rng(1).integers(1, 5000, 50).tolist()
    sectioned, plain = (plan(plans, [1] * 50, lens, n) for n in (64, 0))
    assert np.array_equal(sectioned.buffer, plain.buffer)
