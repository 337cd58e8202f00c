"""Training: documents drawn on the fly, batches of similar length, Muon and AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from storyteller.checkpoint import MAX_POSITIONS
from storyteller.dialogue import Document, write_document
from storyteller.muon import Muon

TOKENS_PER_BATCH = 1536
EASY_SHARE = 0.25
"""Share of the steps that are made easy; see ``batches``."""
DOCUMENTS_PER_DRAW = 512
LAYER_RATE = 5e-3
OTHER_RATE = 3e-3
"""Peak learning rates of the layers' matrices, and of the embedding and the norms."""
WARMUP_STEPS = 50
EASY_SNIPPETS = 0.9
SNIPPETS = 0.2
"""Share of the shortest documents, at first and later."""
NARRATION_WEIGHT = 0.2
"""Weight in the loss of a token that is not part of an answer: most of a story is free choice."""

Batch = tuple[Tensor, Tensor]
"""Token ids ``[b, n]`` int64 and loss weights ``[b, n]`` float32; padding weighs 0."""


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[float]]:
    """Token ids of a document and the weight of each in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    for segment in document:
        piece = tokenizer.encode(segment.text).ids
        ids += piece
        weights += [1.0 if segment.spoken else NARRATION_WEIGHT] * len(piece)
    return ids[:MAX_POSITIONS], weights[:MAX_POSITIONS]


def batches(tokenizer: Tokenizer, rng: Random, easy_batches: int) -> Iterator[Batch]:
    """Endless batches of about ``TOKENS_PER_BATCH`` tokens.

    The first ``easy_batches`` or so are nearly all snippets: looking something up is learnt much
    sooner where there is little to look through, and stays learnt when stories grow long.

    One document a row, so no story sees another; documents of a draw are sorted by length, so
    rows of a batch need little padding. Padding is on the right, where causal attention makes it
    invisible to the real tokens.
    """
    yielded = 0
    while True:
        snippets = EASY_SNIPPETS if yielded < easy_batches else SNIPPETS
        drawn = [
            encode(tokenizer, write_document(rng, snippets)) for _ in range(DOCUMENTS_PER_DRAW)
        ]
        drawn.sort(key=lambda encoded: len(encoded[0]))
        ready: list[Batch] = []
        rows: list[tuple[list[int], list[float]]] = []
        for encoded in drawn:
            if rows and (len(rows) + 1) * len(encoded[0]) > TOKENS_PER_BATCH:
                ready.append(_collate(rows))
                rows = []
            rows.append(encoded)
        ready.append(_collate(rows))
        rng.shuffle(ready)
        yield from ready
        yielded += len(ready)


def _collate(rows: list[tuple[list[int], list[float]]]) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    weights = torch.zeros(len(rows), width)
    for i, (row_ids, row_weights) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        weights[i, : len(row_weights)] = torch.tensor(row_weights)
    return ids, weights


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to a hundredth."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    layers = list(model.model.layers.parameters())
    matrices = [p for p in layers if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        Muon(matrices, lr=LAYER_RATE),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM,
    stream: Iterator[Batch],
    steps: int,
    report: Callable[[int, float], None],
) -> None:
    """Trains ``model`` in place; ``report(step, loss)`` is called after every step."""
    both = optimizers(model)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in both]
    model.train()
    for step in range(steps):
        share = schedule(step, steps)
        ids, weights = next(stream)
        logits = model(input_ids=ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rates in zip(both, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        report(step, loss.item())
    model.eval()
