"""Stateful functions against the full forward of torch, fed in whatever portions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from relax_passes.importer import ImportedCausalLM
from relax_passes.pipeline import compile_causal_lm

MAX_SEQ_LEN = 64
#: How often random chunks are drawn, and what a batch decodes after them.
SEEDS, DECODED = 4, 4

Close = Callable[[np.ndarray, int], None]


def full_forward(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids[None].astype("int64"))).logits[0].float().numpy()


def compile_small(imported: ImportedCausalLM, attention: str = "ours") -> Any:
    return compile_causal_lm(
        imported, attention=attention, max_batch=4, max_seq_len=MAX_SEQ_LEN, prefill_chunk_size=32
    )


def check(run: Any, expected: np.ndarray, ids: np.ndarray, *, tolerance: float) -> None:
    """A whole prefill; then, for several seeds, random chunks and decoding, alone and batched."""

    def close(logits: np.ndarray, position: int) -> None:
        error = np.abs(logits.reshape(-1) - expected[position]).max()
        assert error <= tolerance * np.abs(expected).max(), f"position {position}: {error}"

    run.start(0)
    close(run.run("prefill", [0], [len(ids)], ids[None]), len(ids) - 1)
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        _check_alone(run, ids, rng, close)
        _check_batch(run, expected, ids, rng, close)


def _check_alone(run: Any, ids: np.ndarray, rng: np.random.Generator, close: Close) -> None:
    run.start(0)
    done, end = 0, int(rng.integers(1, len(ids)))
    while done < end:
        n = int(rng.integers(1, end - done + 1))
        logits = run.run("prefill", [0], [n], ids[None, done : done + n])
        done += n
        close(logits, done - 1)
    for position in range(done, len(ids)):
        close(run.run("decode", [0], [1], ids[None, position : position + 1]), position)


def _check_batch(
    run: Any, expected: np.ndarray, ids: np.ndarray, rng: np.random.Generator, close: Close
) -> None:
    """Three sequences, each a start of ``ids`` in chunks of its own; then all decode together."""
    run.start(0, 1, 2)
    done, ends = np.zeros(3, int), rng.integers(1, len(ids) - DECODED + 1, 3)
    while (fed := np.flatnonzero(done < ends)).size:
        lengths = rng.integers(1, (ends - done)[fed] + 1)
        chunks = [ids[done[s] : done[s] + n] for s, n in zip(fed, lengths, strict=True)]
        last = np.cumsum(lengths) - 1
        logits = run.run("batch_prefill", fed, lengths, np.concatenate(chunks)[None], last)
        assert logits.shape == (1, len(fed), expected.shape[1])
        done[fed] += lengths
        for row, sequence in enumerate(fed):
            close(logits[0, row], done[sequence] - 1)
    for _ in range(DECODED):
        logits = run.run("batch_decode", [0, 1, 2], [1, 1, 1], ids[done][:, None])
        assert logits.shape == (3, 1, expected.shape[1])
        for sequence, position in enumerate(done):
            close(logits[sequence], position)
        done += 1
