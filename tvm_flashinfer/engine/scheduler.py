"""Which requests run in the next step: admission, chunked prefill, preemption.

The KV pool is handed out page by page, as tokens come, instead of being reserved for the longest
possible answer. So it can run out, and then the youngest running sequence gives its pages back
and waits, at the head of the queue, to be computed again. That can't deadlock:

- a sequence is accepted only if it fits into the empty pool at its greatest length, and
- the oldest running sequence is never preempted, so it finishes, and the next is the oldest.

Sequences that nobody computes at the moment (a chat between two turns) keep their pages until
someone needs them: they are the first to be evicted.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Protocol

__all__ = ["PagePool", "Scheduler", "TokenSequence"]


class PagePool(Protocol):
    """What the scheduler needs of a KV cache."""

    @property
    def page_size(self) -> int: ...
    @property
    def total_pages(self) -> int: ...
    @property
    def free_pages(self) -> int: ...
    @property
    def max_batch(self) -> int: ...
    def add(self, seq_id: int) -> None: ...
    def remove(self, seq_id: int) -> None: ...
    def pop(self, seq_id: int, count: int) -> None: ...


@dataclasses.dataclass(eq=False)
class TokenSequence:
    """One sequence of tokens, of which a prefix is in the cache.

    Attributes
    ----------
    seq_id: its name in the cache.
    tokens: the prompt and what was generated since.
    cached: how many of ``tokens`` the cache holds; the rest is pending. One pending token is
        appended by a decode step, more by prefill.
    resident: whether the cache knows ``seq_id``.
    """

    seq_id: int
    tokens: list[int]
    cached: int = 0
    resident: bool = False

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.cached


class Scheduler:
    """The queue of waiting sequences, and those that run.

    Attributes
    ----------
    waiting: in order of arrival; running: in order of admission, the oldest first.
    idle: resident sequences that nobody computes, least recently used first.
    preemptions: how often a running sequence had to give its pages back.
    """

    def __init__(self, pool: PagePool, prefill_chunk_size: int) -> None:
        self._pool = pool
        self._chunk = prefill_chunk_size
        self.waiting: deque[TokenSequence] = deque()
        self.running: list[TokenSequence] = []
        self.idle: list[TokenSequence] = []
        self.preemptions = 0

    @property
    def capacity(self) -> int:
        """Tokens that a sequence alone in the pool can have in the cache."""
        return self._pool.total_pages * self._pool.page_size

    def submit(self, sequence: TokenSequence) -> None:
        """Queues a sequence; it must never grow past ``capacity``."""
        if sequence in self.idle:
            self.idle.remove(sequence)
        self.waiting.append(sequence)

    def retire(self, sequence: TokenSequence, *, keep: bool = False) -> None:
        """Takes a sequence out of the queue or of the running; ``keep`` leaves its KV cached."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.idle:
            self.idle.remove(sequence)
        if keep and sequence.resident:
            self.idle.append(sequence)
        else:
            self._evict(sequence)

    def truncate(self, sequence: TokenSequence, length: int) -> None:
        """Forgets what the cache holds of ``sequence`` past its first ``length`` tokens."""
        if sequence.cached > length:
            self._pool.pop(sequence.seq_id, sequence.cached - length)
            sequence.cached = length

    def forget_all(self) -> None:
        """The cache was cleared: everything that ran has to be computed again."""
        for sequence in (*self.running, *self.waiting, *self.idle):
            sequence.cached, sequence.resident = 0, False
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()
        self.idle.clear()

    def next_prefill(self) -> list[tuple[TokenSequence, int]]:
        """Admits what fits; returns sequences and how many of their tokens to append now.

        The counts sum to at most the chunk size, and the pool has pages for all of them. A long
        prompt is spread over several calls.
        """
        self._admit()
        batch = self._prefill_batch()
        # Nothing fits and nothing decodes: the youngest makes room for the older ones.
        while not batch and len(self.running) > 1 and not self._decoding():
            self._preempt_youngest()
            batch = self._prefill_batch()
        return batch

    def next_decode(self) -> list[TokenSequence]:
        """The sequences to append one token to now; the pool has pages for all of them."""
        while True:
            batch = self._decoding()
            need = sum(self._growth(sequence, 1) for sequence in batch)
            if self._make_room(need) or not batch:
                return batch
            self._preempt_youngest()

    # Pages --------------------------------------------------------------------------------------

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._pool.page_size)

    def _growth(self, sequence: TokenSequence, count: int) -> int:
        """Pages that appending ``count`` tokens takes."""
        return self._pages(sequence.cached + count) - self._pages(sequence.cached)

    def _decoding(self) -> list[TokenSequence]:
        return [sequence for sequence in self.running if sequence.pending == 1]

    def _prefill_batch(self) -> list[tuple[TokenSequence, int]]:
        batch = []
        budget, free = self._chunk, self._pool.free_pages
        for sequence in self.running:
            if sequence.pending <= 1:
                continue
            room = (self._pages(sequence.cached) + free) * self._pool.page_size - sequence.cached
            count = min(sequence.pending, budget, room)
            if count > 0:
                batch.append((sequence, count))
                budget -= count
                free -= self._growth(sequence, count)
        return batch

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._pool.max_batch:
            sequence = self.waiting[0]
            if not sequence.resident and not self._make_slot():
                return
            # Everyone's pending tokens, and the next page of each: admitting more than that
            # would only lead to preemptions.
            others = sum(self._growth(other, other.pending + 1) for other in self.running)
            need = self._growth(sequence, sequence.pending)
            if self.running:
                need += others + len(self.running)
            if not self._make_room(need, keep=sequence):
                return
            self.waiting.popleft()
            if not sequence.resident:
                self._pool.add(sequence.seq_id)
                sequence.resident = True
            self.running.append(sequence)

    def _evictable(self, keep: TokenSequence | None) -> Iterator[TokenSequence]:
        yield from list(self.idle)
        yield from [s for s in reversed(self.waiting) if s.resident and s is not keep]

    def _make_room(self, pages: int, keep: TokenSequence | None = None) -> bool:
        """Evicts until ``pages`` are free, if that is possible without touching the running."""
        evictable = list(self._evictable(keep))
        held = sum(self._pages(sequence.cached) for sequence in evictable)
        if pages > self._pool.free_pages + held:
            return False
        for sequence in evictable:
            if pages <= self._pool.free_pages:
                break
            self._evict(sequence)
        return True

    def _make_slot(self) -> bool:
        """Evicts until one more sequence can be added to the cache."""
        resident = sum(s.resident for s in (*self.running, *self.waiting, *self.idle))
        for sequence in self._evictable(None):
            if resident < self._pool.max_batch:
                break
            self._evict(sequence)
            resident -= 1
        return resident < self._pool.max_batch

    def _evict(self, sequence: TokenSequence) -> None:
        if sequence.resident:
            self._pool.remove(sequence.seq_id)
        sequence.cached, sequence.resident = 0, False
        if sequence in self.idle:
            self.idle.remove(sequence)

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self._evict(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
