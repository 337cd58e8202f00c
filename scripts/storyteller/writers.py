"""Batches from several processes: one writes too slowly for a GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer

from storyteller.training import Batch, batches

BATCHES_AHEAD = 4
"""Batches a process keeps ready."""
SEEDS_PER_RUN = 1000
"""Writers of a run are seeded apart, and never as those of the run with the next seed."""


def _write(text: str, seed: int, steps: int, tokens: int, queue: Any) -> None:
    torch.set_num_threads(1)
    # As NumPy arrays: tensors would travel through file descriptors, of which there are few.
    for ids, weights in batches(Tokenizer.from_str(text), Random(seed), steps, tokens):
        queue.put((ids.numpy(), weights.numpy()))


def written_batches(
    tokenizer: Tokenizer, seed: int, steps: int, tokens: int, writers: int
) -> Iterator[Batch]:
    """``batches``, taken in turn from ``writers`` processes: the same ones at every run."""
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue(BATCHES_AHEAD) for _ in range(writers)]
    for index, queue in enumerate(queues):
        args = (
            tokenizer.to_str(),
            seed * SEEDS_PER_RUN + index + 1,
            steps // writers + 1,
            tokens,
            queue,
        )
        context.Process(target=_write, args=args, daemon=True).start()
    while True:
        for queue in queues:
            ids, weights = queue.get()
            yield torch.from_numpy(ids), torch.from_numpy(weights)
