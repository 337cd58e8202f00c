"""The format of a step: prefixes that sequences share are read once where that pays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cache_model import Dims, Twin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvm_flashinfer.kv_cache import KVCache

DIMS = Dims(num_layers=1, max_batch_size=10, max_total_seq_len=1200, prefill_chunk_size=256)
ITEM = ("row", "q_begin", "q_count", "kv_begin", "kv_count", "head", "partial", "level")


def coverage(cache: KVCache, page_size: int) -> list[dict[int, tuple[int, int]]]:
    """Of every query token of the last step: which key positions it visits, and where they lie.

    Tokens come in the order of their requests, whatever order the plan has them in.
    """

    def section(name: str) -> Any:
        return cache.plan_section(name).numpy()

    header, max_requests = section("header"), len(section("request_kv_len"))
    num_items, num_tokens, num_levels = header[0], header[2], header[4]
    kv_indptr = section("kv_indptr").reshape(-1, max_requests + 1)[:num_levels]
    kv_position = section("kv_position").reshape(-1, max_requests)[:num_levels]
    pages = section("kv_indices")
    visited: list[dict[int, tuple[int, int]]] = [{} for _ in range(num_tokens)]
    for fields in section("items").reshape(-1, 8)[:num_items].tolist():
        item = dict(zip(ITEM, fields, strict=True))
        if item["head"] != 0:
            continue
        level, row = item["level"], item["row"]
        for token in range(item["q_begin"], item["q_begin"] + item["q_count"]):
            for key in range(item["kv_begin"], item["kv_begin"] + item["kv_count"]):
                position = int(kv_position[level, row]) + key
                page = int(pages[kv_indptr[level, row] + key // page_size])
                assert position not in visited[token], "a key is read twice"
                visited[token][position] = (page, key % page_size)
    place = list(zip(section("q_request")[:num_tokens], section("q_position"), strict=False))
    return [visited[token] for token in sorted(range(num_tokens), key=lambda t: place[t])]


def check_coverage(composed: Twin, flat: Twin) -> None:
    """Both visit the same keys up to every query's own, each once."""
    page_size = composed.dims.page_size
    positions = flat.cache.plan_section("q_position").numpy()
    pairs = zip(coverage(composed.cache, page_size), coverage(flat.cache, page_size), strict=True)
    for token, (got, expected) in enumerate(pairs):
        seen = range(positions[token] + 1)
        assert [got.get(p) for p in seen] == [expected[p] for p in seen]


def twins(dims: Dims, format: str, seed: int = 0) -> tuple[Twin, Twin]:
    composed, flat = Twin(dims, seed), Twin(dims, seed)
    composed.cache.use_format(format)
    flat.cache.use_format("flat")
    return composed, flat


def family(twin: Twin, prefix: int, children: int) -> list[int]:
    """A sequence and its forks, each with a token of its own; returns them all."""
    twin.add(0)
    for begin in range(0, prefix, 200):
        twin.forward([0], [min(200, prefix - begin)])
    for child in range(1, children + 1):
        twin.fork(0, child)
    everyone = list(range(children + 1))
    twin.forward(everyone, [1] * len(everyone))
    return everyone


@pytest.mark.parametrize("format", ["auto", "shared"])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fork_trees(data: st.DataObject, page_size: int, format: str) -> None:
    """Any tree of forks, in any order within the batch: the same keys, the oracle's numbers."""
    dims = replace(
        DIMS,
        page_size=page_size,
        num_qo_heads=data.draw(st.sampled_from([2, 6, 8]), label="query heads"),
    )
    both = twins(dims, format, data.draw(st.integers(0, 99), label="seed"))

    def each(call: str, *args: Any) -> None:
        for twin in both:
            getattr(twin, call)(*args)

    composed, flat = both
    each("add", 0)
    each("forward", [0], [data.draw(st.integers(1, 120), label="prompt")])
    for child in range(1, data.draw(st.integers(2, 9), label="forks") + 1):
        parent = data.draw(st.integers(0, child - 1), label="parent")
        length = composed.length(parent)
        position = data.draw(st.integers(length // 2, length), label="position")
        each("fork", parent, child, position)
        grown = data.draw(st.integers(0, 40), label="grown")
        if grown:
            each("forward", [child], [grown])
    for _ in range(3):
        order = data.draw(st.permutations(range(child + 1)), label="order")
        batch = order[: data.draw(st.integers(1, child + 1), label="batch")]
        lengths = [data.draw(st.sampled_from([1, 1, 1, 2, 3, 20, 0])) for _ in batch]
        each("forward", batch, lengths)
        check_coverage(composed, flat)
    composed.check()


def test_a_shared_prompt_is_read_once() -> None:
    composed, flat = twins(DIMS, "auto")
    for twin in (composed, flat):
        everyone = family(twin, 200, 9)
    assert composed.cache.num_levels == 2
    assert flat.cache.num_levels == 1
    check_coverage(composed, flat)
    # Twelve full pages are listed once, and a page with the rest for each sequence.
    assert composed.cache.plan_section("header").numpy()[5] == 12 + len(everyone)


def test_prefixes_within_prefixes() -> None:
    """Three families under one prompt: three levels."""
    composed, flat = twins(replace(DIMS, num_qo_heads=2), "auto")
    for twin in (composed, flat):
        twin.add(0)
        for _ in range(2):
            twin.forward([0], [200])
        for child in (1, 2):
            twin.fork(0, child)
        for parent in range(3):
            twin.forward([parent], [160])
        for child in range(3, 9):
            twin.fork(child % 3, child)
        twin.forward([0, 3, 6, 1, 4, 7, 2, 5, 8], [1] * 9)
    assert composed.cache.num_levels == 3
    check_coverage(composed, flat)


def test_families_that_take_turns_in_the_batch() -> None:
    """Sequences of two prompts, one after the other: their queries change places."""
    composed, flat = twins(replace(DIMS, num_qo_heads=2), "auto")
    for twin in (composed, flat):
        for seq_id in range(2):
            twin.add(seq_id)
            twin.forward([seq_id], [200])
        for child in range(2, 10):
            twin.fork(child % 2, child)
        for form in ("token", "head", "fused"):
            twin.forward(list(range(10)), [1, 2, 1, 1, 1, 3, 1, 1, 1, 1], form)
    assert composed.cache.num_levels == 2
    assert set(composed.cache.plan_section("q_request").numpy()[:5]) == {0, 2, 4, 6, 8}
    check_coverage(composed, flat)


def test_what_does_not_pay_stays_flat() -> None:
    for prefix, children, expected in ((8, 9, 1), (16, 1, 1), (400, 1, 2)):
        twin = Twin(DIMS)
        family(twin, prefix, children)
        assert twin.cache.num_levels == expected, (prefix, children)
    strangers = Twin(DIMS)
    for seq_id in range(8):
        strangers.add(seq_id)
    strangers.forward(list(range(8)), [20] * 8)
    strangers.forward(list(range(8)), [1] * 8)
    assert strangers.cache.num_levels == 1


def test_more_prefixes_than_levels() -> None:
    """A chain of forks deeper than the plan: the best cuts are taken."""
    composed, flat = twins(DIMS, "shared")
    for twin in (composed, flat):
        twin.add(0)
        twin.forward([0], [40])
        for child in range(1, 10):
            twin.fork(child - 1, child)
            twin.forward([child], [32])
        twin.forward(list(range(10)), [1] * 10)
    assert 2 <= composed.cache.num_levels <= 5
    check_coverage(composed, flat)


def test_a_prefill_chunk_among_decoding_forks() -> None:
    composed, flat = twins(DIMS, "auto")
    for twin in (composed, flat):
        everyone = family(twin, 200, 7)
        twin.fork(0, 8)
        twin.forward([*everyone, 8], [1] * 8 + [100])
    assert composed.cache.num_levels == 2
    check_coverage(composed, flat)


def test_windows_and_token_trees_over_a_shared_prompt() -> None:
    twin = Twin(replace(DIMS, sliding_window=True))
    twin.cache.use_format("shared")
    everyone = family(twin, 200, 7)
    for seq_id in everyone:
        twin.enable_window(seq_id, 150, 8)
    twin.forward(everyone, [1] * 8)
    twin.forward(everyone, [1] * 8)  # the windows have slid, all alike
    assert twin.cache.num_levels == 2
    twin.forward(everyone, [3] * 8, trees=[[-1, 0, 0]] * 8)
    assert twin.cache.num_levels == 3
    twin.commit(everyone, [2] * 8)
    twin.forward(everyone, [1] * 8)
    twin.check()


def test_flat_by_request_and_unknown_formats() -> None:
    twin = Twin(DIMS)
    twin.cache.use_format("flat")
    family(twin, 200, 9)
    assert twin.cache.num_levels == 1
    with pytest.raises(ValueError, match='argument `format` is "deep", expected "auto"'):
        twin.cache.use_format("deep")
    with pytest.raises(ValueError, match='argument `name` is "rows", expected a section'):
        twin.cache.plan_section("rows")


def test_a_refused_step_leaves_the_plan_of_the_last_one() -> None:
    twin = Twin(replace(DIMS, max_total_seq_len=384))
    everyone = family(twin, 200, 9)
    before = coverage(twin.cache, DIMS.page_size)
    with pytest.raises(ValueError, match="free pages"):
        twin.cache.begin_forward(everyone, [20] * 10)
    assert coverage(twin.cache, DIMS.page_size) == before
    assert np.array_equal(twin.cache.plan_section("header").numpy()[[2, 4]], [10, 2])
