"""A model on paper: the engine's view of a compiled model, with a checkable meaning.

Its cache stores the tokens themselves, page by page, and its next token is a hash of everything
in the cache. So any mistake in what the engine appends, pops, evicts or computes again changes
the answer, and thousands of schedules run in a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from tvm_flashinfer.manifest import Generation, Manifest

VOCAB = 50


def manifest(**changes: object) -> Manifest:
    """A manifest with small limits."""
    fields: dict[str, object] = {
        "target": "llvm",
        "device": "cpu",
        "attention": "ours",
        "dtype": "float32",
        "page_size": 4,
        "max_batch": 4,
        "max_seq_len": 64,
        "prefill_chunk_size": 16,
        "params": (),
        "model": {"vocab_size": VOCAB},
        "versions": {"tvm": "0"},
        "generation": Generation(),
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def next_token(tokens: Sequence[int]) -> int:
    """The token that follows ``tokens``."""
    digest = hashlib.sha256(np.asarray(tokens, dtype=np.int32).tobytes()).digest()
    return int.from_bytes(digest[:4], "little") % VOCAB


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What a request alone in the world answers."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class PaperModel:
    """Checks every call as a KV cache would: pages, known sequences, chunk size, batch size."""

    def __init__(self, pages: int, **changes: object) -> None:
        self.manifest = manifest(**changes)
        self.page_size = self.manifest.page_size
        self.max_batch = self.manifest.max_batch
        self.total_pages = pages
        self.cache: dict[int, list[int]] = {}
        self.fail_next = False

    @property
    def free_pages(self) -> int:
        used = sum(-(-len(tokens) // self.page_size) for tokens in self.cache.values())
        return self.total_pages - used

    def add(self, seq_id: int) -> None:
        assert seq_id not in self.cache
        self.cache[seq_id] = []
        assert len(self.cache) <= self.max_batch

    def remove(self, seq_id: int) -> None:
        del self.cache[seq_id]

    def pop(self, seq_id: int, count: int) -> None:
        assert 0 < count <= len(self.cache[seq_id])
        del self.cache[seq_id][-count:]

    def clear(self) -> None:
        self.cache.clear()

    def prefill(
        self, seq_ids: Sequence[int], chunks: Sequence[Sequence[int]], wanted: Sequence[int]
    ) -> np.ndarray:
        assert sum(map(len, chunks)) <= self.manifest.prefill_chunk_size
        rows = self._append(seq_ids, chunks)
        return rows[list(wanted)]

    def decode(self, seq_ids: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        return self._append(seq_ids, [[token] for token in tokens])

    def _append(self, seq_ids: Sequence[int], chunks: Sequence[Sequence[int]]) -> np.ndarray:
        assert len(set(seq_ids)) == len(seq_ids) <= self.max_batch
        logits = np.zeros((len(seq_ids), VOCAB), np.float32)
        for row, (seq_id, chunk) in enumerate(zip(seq_ids, chunks, strict=True)):
            assert len(chunk) > 0
            self.cache[seq_id].extend(chunk)
            logits[row, next_token(self.cache[seq_id])] = 1
            if self.fail_next:
                self.fail_next = False
                raise RuntimeError("the pass broke off half way")
        assert self.free_pages >= 0
        return logits
