"""Stateful functions against the full forward of torch, fed in whatever portions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from relax_passes.importer import ImportedCausalLM
from relax_passes.pipeline import compile_causal_lm

MAX_SEQ_LEN = 64


def full_forward(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids[None].astype("int64"))).logits[0].float().numpy()


def compile_small(imported: ImportedCausalLM, attention: str = "ours") -> Any:
    return compile_causal_lm(
        imported, attention=attention, max_batch=4, max_seq_len=MAX_SEQ_LEN, prefill_chunk_size=32
    )


def check(run: Any, expected: np.ndarray, ids: np.ndarray, *, tolerance: float) -> None:
    """A whole prefill; chunks, then decode; a ragged batch, then batched decode."""

    def close(logits: np.ndarray, position: int) -> None:
        error = np.abs(logits.reshape(-1) - expected[position]).max()
        assert error <= tolerance * np.abs(expected).max(), f"position {position}: {error}"

    last = len(ids) - 1
    run.start(0, 1)
    close(run.run("prefill", [0], [len(ids)], ids[None]), last)
    close(run.run("prefill", [1], [7], ids[None, :7]), 6)
    close(run.run("prefill", [1], [9], ids[None, 7:16]), 15)
    for position in range(16, len(ids)):
        close(run.run("decode", [1], [1], ids[None, position : position + 1]), position)

    lengths = np.array([5, 11, 2])
    run.start(0, 1, 2)
    ragged = np.concatenate([ids[:n] for n in lengths])[None]
    logits = run.run("batch_prefill", [0, 1, 2], lengths, ragged, np.cumsum(lengths) - 1)
    assert logits.shape == (1, 3, expected.shape[1])
    for row, n in enumerate(lengths):
        close(logits[0, row], n - 1)
    for step in range(4):
        column = ids[lengths + step][:, None]
        logits = run.run("batch_decode", [0, 1, 2], [1, 1, 1], column)
        assert logits.shape == (3, 1, expected.shape[1])
        for row, n in enumerate(lengths):
            close(logits[row], n + step)
