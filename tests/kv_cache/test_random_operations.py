"""Random operations against the model: K, V, lengths, pages and attention agree at every step."""

from __future__ import annotations

from collections.abc import Callable

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
    run_state_machine_as_test,
)

QUICK = settings(
    max_examples=12,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
HEAVY = settings(QUICK, max_examples=150, stateful_step_count=150)

CHUNK = 24  # most tokens of a step


def any_sequence(machine: Operations) -> bool:
    return bool(machine.twin.sequences)


def any_committed(machine: Operations) -> bool:
    return bool(machine.committed())


def room_for_one(machine: Operations) -> bool:
    return len(machine.twin.sequences) < machine.max_sequences


class Operations(RuleBasedStateMachine):
    """Any order of calls that a user may make, valid ones and refused ones."""

    max_sequences = 12
    first_sequences = 0
    pool_scale = 1
    operations = 0  # of all examples
    seeds = st.integers(0, 1000)

    @initialize(
        page_size=st.sampled_from([1, 3, 5, 16]),
        tokens=st.integers(40, 200),
        dtype=st.sampled_from(["float32", "float16"]),
        sliding_window=st.booleans(),
        seed=seeds,
    )
    def create(
        self, page_size: int, tokens: int, dtype: str, sliding_window: bool, seed: int
    ) -> None:
        dims = Dims(
            page_size=page_size,
            dtype=dtype,
            max_total_seq_len=tokens * self.pool_scale,
            max_batch_size=4,
            prefill_chunk_size=CHUNK,
            sliding_window=sliding_window,
        )
        self.twin = Twin(dims, seed)
        self.next_id = 0
        for _ in range(self.first_sequences):
            self.add()

    def committed(self) -> list[int]:
        """Sequences that end in no token tree."""
        return sorted(set(self.twin.sequences) - set(self.twin.trees))

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    @staticmethod
    def one_of(data: st.DataObject, ids: list[int]) -> int:
        return data.draw(st.sampled_from(ids), label="sequence")

    @staticmethod
    def some_of(data: st.DataObject, ids: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(ids), max_size=4, unique=True), label="ids")

    # -- sequences

    @precondition(room_for_one)
    @rule()
    def add(self) -> None:
        self.twin.add(self.new_id())

    @precondition(any_committed)
    @precondition(room_for_one)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.one_of(data, self.committed())
        position = data.draw(st.integers(-1, self.twin.length(parent)), label="position")
        self.twin.fork(parent, self.new_id(), position)

    @precondition(any_sequence)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.twin.remove(self.one_of(data, sorted(self.twin.sequences)))

    @precondition(any_sequence)
    @rule(data=st.data())
    def pop(self, data: st.DataObject) -> None:
        seq_id = self.one_of(data, sorted(self.twin.sequences))
        self.twin.pop(seq_id, data.draw(st.integers(0, self.twin.length(seq_id)), label="count"))

    @precondition(any_sequence)
    @precondition(lambda self: self.twin.dims.sliding_window)
    @rule(data=st.data(), window=st.integers(1, 30))
    def enable_window(self, data: st.DataObject, window: int) -> None:
        seq_id = self.one_of(data, sorted(self.twin.sequences))
        sink = data.draw(st.integers(0, window - 1), label="sink")
        try:
            self.twin.enable_window(seq_id, window, sink)
        except ValueError as error:
            # It has one, or was forked out of another one.
            assert seq_id in self.twin.windows or "forked from a window" in str(error)

    # -- steps

    @precondition(any_committed)
    @rule(data=st.data())
    def forward(self, data: st.DataObject) -> None:
        ids = self.some_of(data, self.committed())
        longest = CHUNK // max(1, len(ids))
        self.step(ids, [data.draw(st.integers(0, longest), label="length") for _ in ids])

    @precondition(any_committed)
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        ids = self.some_of(data, self.committed())
        self.step(ids, [1] * len(ids))

    @precondition(any_sequence)
    @rule(data=st.data())
    def draft(self, data: st.DataObject) -> None:
        """Grow a token tree on each of some sequences."""
        ids = self.some_of(data, sorted(self.twin.sequences))
        trees = []
        for seq_id in ids:
            old = len(self.twin.trees.get(seq_id, []))
            nodes = data.draw(st.integers(0, CHUNK // len(ids)), label="nodes")
            trees.append(
                [data.draw(st.integers(-1, old + i - 1), label="parent") for i in range(nodes)]
            )
        self.step(ids, [len(tree) for tree in trees], trees)

    @precondition(lambda self: bool(self.twin.trees))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        ids = self.some_of(data, sorted(self.twin.trees))
        leaves = [
            data.draw(st.integers(-1, len(self.twin.trees[s]) - 1), label="leaf") for s in ids
        ]
        self.twin.commit(ids, leaves)

    def step(
        self, ids: list[int], lengths: list[int], trees: list[list[int]] | None = None
    ) -> None:
        """A step, or, where the pool can't hold it, its refusal."""
        if self.twin.fits(ids, lengths):
            self.twin.forward(ids, lengths, trees=trees)
            return
        parents = None if trees is None else [parent for tree in trees for parent in tree]
        with pytest.raises(ValueError, match="free pages"):
            self.twin.cache.begin_forward(ids, lengths, parents)

    @precondition(any_committed)
    @rule(data=st.data())
    def masked(self, data: st.DataObject) -> None:
        """A step whose tokens see any of each other."""
        ids = self.some_of(data, self.committed())
        lengths = [data.draw(st.integers(0, 6), label="length") for _ in ids]
        if self.twin.fits(ids, lengths):
            masks = [self.twin.rng.random((n, n)) < 0.5 for n in lengths]
            self.twin.forward(ids, lengths, masks=masks)

    @precondition(any_committed)
    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        """A sequence leaves, and comes in under its own id, another's, or a new one."""
        source = self.one_of(data, self.committed())
        others = self.committed() + ([self.new_id()] if room_for_one(self) else [])
        target = self.one_of(data, others)
        after = self.twin.pages.copy()
        after.tokens[target] = []
        after.append(target, self.twin.length(source))
        if after.in_use() <= self.twin.dims.num_pages:
            self.twin.import_from(self.twin, source, target)
        else:
            with pytest.raises(ValueError, match="pages of"):
                metadata, tensors = self.twin.cache.export_sequence(source)
                self.twin.cache.import_sequence(target, metadata, tensors)

    # -- failures

    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        """A call that must fail; the invariant then finds everything as it was."""
        cache, unknown = self.twin.cache, 10**9
        known = sorted(self.twin.sequences)
        some = known[0] if known else unknown
        length = self.twin.length(some) if known else 0
        calls: list[tuple[type[Exception], Callable[[], object]]] = [
            (ValueError, lambda: cache.remove_sequence(unknown)),
            (ValueError, lambda: cache.fork_sequence(unknown, unknown + 1)),
            (ValueError, lambda: cache.pop(some, length + 1)),
            (ValueError, lambda: cache.begin_forward([some, unknown], [1, 1])),
            (ValueError, lambda: cache.begin_forward([some, some], [1, 1])),
            (ValueError, lambda: cache.begin_forward([some], [CHUNK + 1])),
            (ValueError, lambda: cache.begin_forward([some], [1, 1])),
            (ValueError, lambda: cache.begin_forward([some], [2], [-1, length + 1])),
            (ValueError, lambda: cache.begin_forward([some], [2], [-1])),
            (ValueError, lambda: cache.commit_tree([some], [length])),
            (RuntimeError, lambda: cache.end_forward()),
            (RuntimeError, lambda: cache.query_positions()),
        ]
        if known:
            calls.append((ValueError, lambda: cache.add_sequence(some)))
            calls.append((Exception, lambda: cache.fork_sequence(some, known[-1])))
            calls.append((Exception, lambda: cache.fork_sequence(some, unknown, length + 1)))
        if self.twin.trees:
            drafted = min(self.twin.trees)
            calls.append((RuntimeError, lambda: cache.begin_forward([drafted], [1])))
            calls.append((RuntimeError, lambda: cache.fork_sequence(drafted, unknown)))
        kind, call = data.draw(st.sampled_from(calls), label="call")
        with pytest.raises(kind):
            call()

    @precondition(any_committed)
    @rule(data=st.data())
    def failed_attention(self, data: st.DataObject) -> None:
        """Attention with a wrong operand fails; the step ends and its tokens can be popped."""
        seq_id = self.one_of(data, self.committed())
        if seq_id in self.twin.windows or not self.twin.fits([seq_id], [2]):
            return
        with self.twin.cache.step([seq_id], [2]):
            q, k, v = (self.twin.random(2, heads, 32) for heads in (6, 2, 1))
            with pytest.raises(ValueError, match="argument `v` has shape"):
                self.twin._attend(0, q, k, v, "token")
        self.twin.sequences[seq_id] = self.twin.cached(seq_id, 0, self.twin.length(seq_id) + 2)
        self.twin.pages.append(seq_id, 2)
        self.twin.pop(seq_id, 2)

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "twin"):
            self.twin.check()
            type(self).operations += 1

    def teardown(self) -> None:
        if hasattr(self, "twin"):
            for seq_id in list(self.twin.sequences):
                self.twin.remove(seq_id)
            self.twin.check()  # every page is free
            assert self.twin.cache.num_free_pages == self.twin.dims.num_pages


class ManyOperations(Operations):
    max_sequences = 80
    first_sequences = 55
    pool_scale = 6


TestOperations = Operations.TestCase
TestOperations.settings = QUICK


@pytest.mark.heavy
def test_ten_thousand_operations_over_fifty_sequences() -> None:
    run_state_machine_as_test(ManyOperations, settings=HEAVY)
    assert ManyOperations.operations >= 10_000
