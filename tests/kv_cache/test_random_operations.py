"""Random operations against the model: K, V, lengths, pages and attention agree at every step."""

from __future__ import annotations

from typing import Any

import pytest
from cache_model import Dims, Twin
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

QUICK = settings(
    max_examples=12,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
#: 60 * 220 = 13,200 operations.
HEAVY = settings(QUICK, max_examples=60, stateful_step_count=220)


class Pages:
    """What pages a set of sequences needs, counted from who wrote which page: no reference count.

    A page is a list of tokens; two sequences share one if they hold the same list object.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.held: dict[int, list[object]] = {}
        self.lengths: dict[int, int] = {}

    def in_use(self) -> int:
        return len({id(page) for pages in self.held.values() for page in pages})

    def resize(self, seq_id: int, length: int) -> None:
        pages = self.held[seq_id]
        while len(pages) * self.page_size < length:
            pages.append(object())
        del pages[-(-length // self.page_size) :]
        self.lengths[seq_id] = length

    def append(self, seq_id: int, count: int) -> None:
        pages, length = self.held[seq_id], self.lengths[seq_id]
        if count and length % self.page_size:
            last = pages[-1]
            if any(last in other for s, other in self.held.items() if s != seq_id):
                pages[-1] = object()
        self.resize(seq_id, length + count)

    def fork(self, parent: int, child: int, length: int) -> None:
        self.held[child] = list(self.held[parent])
        self.resize(child, length)

    def copy(self) -> Pages:
        other = Pages(self.page_size)
        other.held = {s: list(pages) for s, pages in self.held.items()}
        other.lengths = dict(self.lengths)
        return other


class Operations(RuleBasedStateMachine):
    """Any order of calls that a user may make, valid ones and refused ones."""

    max_sequences = 12

    @initialize(
        page_size=st.sampled_from([1, 3, 5, 16]),
        tokens=st.integers(40, 200),
        dtype=st.sampled_from(["float32", "float16"]),
        seed=st.integers(0, 1000),
    )
    def create(self, page_size: int, tokens: int, dtype: str, seed: int) -> None:
        self.twin = Twin(
            Dims(
                page_size=page_size,
                dtype=dtype,
                max_total_seq_len=tokens,
                max_batch_size=4,
                prefill_chunk_size=24,
            ),
            seed,
        )
        self.pages = Pages(page_size)
        self.next_id = 0

    def known(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.twin.sequences)), label="sequence")

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def has_sequences(self) -> bool:
        return bool(self.twin.sequences)

    def has_room(self) -> bool:
        return len(self.twin.sequences) < self.max_sequences

    @precondition(has_room)
    @rule()
    def add(self) -> None:
        seq_id = self.new_id()
        self.twin.add(seq_id)
        self.pages.held[seq_id], self.pages.lengths[seq_id] = [], 0

    @precondition(lambda self: self.has_sequences() and self.has_room())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent, child = self.known(data), self.new_id()
        length = self.twin.sequences[parent].length
        position = data.draw(st.integers(-1, length), label="position")
        self.twin.fork(parent, child, position)
        self.pages.fork(parent, child, length if position == -1 else position)

    @precondition(has_sequences)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        seq_id = self.known(data)
        self.twin.remove(seq_id)
        del self.pages.held[seq_id], self.pages.lengths[seq_id]

    @precondition(has_sequences)
    @rule(data=st.data())
    def pop(self, data: st.DataObject) -> None:
        seq_id = self.known(data)
        length = self.twin.sequences[seq_id].length
        count = data.draw(st.integers(0, length), label="count")
        self.twin.pop(seq_id, count)
        self.pages.resize(seq_id, length - count)

    @precondition(has_sequences)
    @rule(data=st.data())
    def forward(self, data: st.DataObject) -> None:
        """A step of some sequences; where the pool can't hold it, it must be refused whole."""
        known = sorted(self.twin.sequences)
        ids = data.draw(st.lists(st.sampled_from(known), max_size=4, unique=True), label="ids")
        longest = 24 // max(1, len(ids))
        lengths = [data.draw(st.integers(0, longest), label="length") for _ in ids]
        after = self.pages.copy()
        for seq_id, count in zip(ids, lengths, strict=True):
            after.append(seq_id, count)
        if after.in_use() <= self.twin.dims.num_pages:
            self.twin.forward(ids, lengths)
            self.pages = after
        else:
            with pytest.raises(ValueError, match="free pages"):
                self.twin.cache.begin_forward(ids, lengths)

    @precondition(has_sequences)
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        ids = data.draw(
            st.lists(st.sampled_from(sorted(self.twin.sequences)), max_size=4, unique=True),
            label="ids",
        )
        after = self.pages.copy()
        for seq_id in ids:
            after.append(seq_id, 1)
        if after.in_use() <= self.twin.dims.num_pages:
            self.twin.forward(ids, [1] * len(ids))
            self.pages = after

    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        """A call that must fail; the invariants then find everything as it was."""
        cache, unknown = self.twin.cache, 10**9
        known = sorted(self.twin.sequences)
        some = known[0] if known else unknown
        length = self.twin.sequences[some].length if known else 0
        calls: list[tuple[type[Exception], Any]] = [
            (ValueError, lambda: cache.remove_sequence(unknown)),
            (ValueError, lambda: cache.fork_sequence(unknown, unknown + 1)),
            (ValueError, lambda: cache.fork_sequence(some, unknown + 1, length + 1)),
            (ValueError, lambda: cache.pop(some, length + 1)),
            (ValueError, lambda: cache.begin_forward([some, unknown], [1, 1])),
            (ValueError, lambda: cache.begin_forward([some, some], [1, 1])),
            (ValueError, lambda: cache.begin_forward([some], [25])),
            (ValueError, lambda: cache.begin_forward([some], [1, 1])),
            (RuntimeError, lambda: cache.end_forward()),
            (RuntimeError, lambda: cache.query_positions()),
        ]
        if known:
            calls.append((ValueError, lambda: cache.add_sequence(some)))
            calls.append((ValueError, lambda: cache.fork_sequence(some, known[-1])))
        kind, call = data.draw(st.sampled_from(calls), label="call")
        with pytest.raises(kind):
            call()

    @precondition(has_sequences)
    @rule(data=st.data())
    def abandoned_step(self, data: st.DataObject) -> None:
        """Attention with a wrong operand fails; the step goes on and its tokens can be popped."""
        seq_id = self.known(data)
        after = self.pages.copy()
        after.append(seq_id, 2)
        if after.in_use() > self.twin.dims.num_pages:
            return
        with self.twin.cache.step([seq_id], [2]):
            q, k, v = (self.twin.random(2, heads, 32) for heads in (6, 2, 1))
            with pytest.raises(ValueError, match="argument `v` has shape"):
                self.twin._attend(0, q, k, v, "token")
        self.twin.cache.pop(seq_id, 2)
        after.resize(seq_id, after.lengths[seq_id] - 2)
        self.pages = after

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "twin"):
            return
        self.twin.check()
        free = self.twin.dims.num_pages - self.pages.in_use()
        assert self.twin.cache.num_free_pages == free

    def teardown(self) -> None:
        if not hasattr(self, "twin"):
            return
        for seq_id in list(self.twin.sequences):
            self.twin.remove(seq_id)
        self.twin.check()


class ManyOperations(Operations):
    max_sequences = 80


TestOperations = Operations.TestCase
TestOperations.settings = QUICK

TestManyOperations = pytest.mark.heavy(ManyOperations.TestCase)
TestManyOperations.settings = HEAVY
