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

DOCUMENTS_PER_1024_TOKENS = 256
"""Documents drawn at a time, by the size of a batch: enough to fill many rows of like length."""
LAYER_RATE = 6e-3
OTHER_RATE = 3e-3
"""Peak learning rates of the layers' matrices, and of the embedding and the norms."""
WARMUP_STEPS = 50
EASY_UNTIL, HARD_FROM = 0.3, 0.6
"""Parts of the training that are over when stories begin to grow long, and when they have."""
EASY_SNIPPETS, HARD_SNIPPETS = 0.95, 0.2
"""Share of the shortest documents, at first and in the end."""

REPORT_EVERY = 10

Batch = tuple[Tensor, Tensor]
"""Token ids ``[b, n]`` int64 and loss weights ``[b, n]`` float32; padding weighs 0."""


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[float]]:
    """Token ids of a document and the weight of each in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    for segment in document:
        piece = tokenizer.encode(segment.text).ids
        ids += piece
        weights += [segment.weight] * len(piece)
    return ids[:MAX_POSITIONS], weights[:MAX_POSITIONS]


def snippet_share(progress: float) -> float:
    """Share of snippets among the documents at ``progress`` (0 to 1) of the training.

    Looking something up is learnt much sooner where there is little to look through, and stays
    learnt when stories grow long.
    """
    hardness = (progress - EASY_UNTIL) / (HARD_FROM - EASY_UNTIL)
    return EASY_SNIPPETS + (HARD_SNIPPETS - EASY_SNIPPETS) * min(1.0, max(0.0, hardness))


def batches(tokenizer: Tokenizer, rng: Random, steps: int, tokens: int) -> Iterator[Batch]:
    """At least ``steps`` batches of about ``tokens`` tokens, without end.

    One document a row, so no story sees another; documents of a draw are sorted by length, so
    rows of a batch need little padding. Padding is on the right, where causal attention makes it
    invisible to the real tokens.
    """
    documents = max(1, DOCUMENTS_PER_1024_TOKENS * min(tokens, 3072) // 1024)
    yielded = 0
    while True:
        snippets = snippet_share(yielded / steps)
        drawn = [encode(tokenizer, write_document(rng, snippets)) for _ in range(documents)]
        drawn.sort(key=lambda encoded: len(encoded[0]))
        ready: list[Batch] = []
        rows: list[tuple[list[int], list[float]]] = []
        for encoded in drawn:
            if rows and (len(rows) + 1) * len(encoded[0]) > tokens:
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
    """Trains ``model`` in place, on its device; ``report(step, loss)`` follows every tenth step.

    Reading the loss waits for the device, which is then idle until the next step is queued.
    """
    both = optimizers(model)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in both]
    model.train()
    for step in range(steps):
        share = schedule(step, steps)
        ids, weights = (tensor.to(model.device) for tensor in next(stream))
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
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            report(step, loss.item())
    model.eval()
