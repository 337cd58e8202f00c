"""Whatever was done to a cache: the logits of the same tokens in a sequence of their own."""

from __future__ import annotations

import numpy as np
from engine import VOCABULARY, Array, Engine
from models import compile_model

TOLERANCE = 1e-4


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCABULARY, count)]


def check(found: Array, history: list[int]) -> None:
    """`found` are the logits after `history`."""
    alone = Engine(compile_model("llama"))
    alone.add(0)
    for begin in range(0, len(history), 64):
        expected = alone.prefill({0: history[begin : begin + 64]})
    np.testing.assert_allclose(found.reshape(-1), expected[0], atol=TOLERANCE)
