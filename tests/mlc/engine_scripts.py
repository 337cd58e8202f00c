"""What an engine may do to a model, as generators of the logits of every step.

A script is given an :class:`~engine.Engine` and a source of random tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from engine import VOCABULARY, Array, Engine

Script = Callable[[Engine, Callable[[int], list[int]]], Iterator[Array]]


def whole_prompts(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    for seq_id, length in enumerate((1, 17, 40)):
        engine.add(seq_id)
        yield engine.prefill({seq_id: draw(length)})
    for _ in range(3):
        yield engine.decode({1: draw(1)[0]})


def chunked_prompts(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    engine.add(7)
    for length in (64, 33, 1, 50):
        yield engine.prefill({7: draw(length)})
    yield engine.decode({7: draw(1)[0]})


def continuous_batch(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    for seq_id in (3, 1, 2):
        engine.add(seq_id)
    yield engine.prefill({3: draw(20), 1: draw(5), 2: draw(31)})
    for _ in range(18):  # over a page boundary
        yield engine.decode({1: draw(1)[0], 3: draw(1)[0]})
    yield engine.prefill({2: draw(16), 1: draw(3)})
    engine.remove(1)
    yield engine.decode({2: draw(1)[0], 3: draw(1)[0]})


def shared_prefix(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    engine.add(0)
    yield engine.prefill({0: draw(50)})
    for child, position in ((1, -1), (2, 32), (3, 41), (4, -1)):
        engine.fork(0, child, position)
    yield engine.prefill({2: draw(9), 3: draw(4)})
    for _ in range(3):
        yield engine.decode({seq_id: draw(1)[0] for seq_id in range(5)})


def rolled_back(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    engine.add(0)
    yield engine.prefill({0: draw(40)})
    for count in (1, 7, 16):
        engine.pop(0, count)
        yield engine.decode({0: draw(1)[0]})


def chains_verified(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    engine.add(0)
    engine.add(1)
    yield engine.prefill({0: draw(21), 1: draw(10)})
    for _ in range(3):
        yield engine.verify({0: draw(4), 1: draw(6)})
        engine.pop(0, 3)
        engine.pop(1, 2)
    yield engine.decode({0: draw(1)[0], 1: draw(1)[0]})


SCRIPTS = [
    whole_prompts,
    chunked_prompts,
    continuous_batch,
    shared_prefix,
    rolled_back,
    chains_verified,
]


def windows_slide(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    engine.add(0)
    engine.add(1)
    yield engine.prefill({0: draw(40), 1: draw(7)})
    yield engine.prefill({0: draw(30)})
    for _ in range(12):
        yield engine.decode({0: draw(1)[0], 1: draw(1)[0]})
    yield engine.prefill({1: draw(50), 0: draw(3)})
    for _ in range(20):
        yield engine.decode({1: draw(1)[0], 0: draw(1)[0]})
    engine.remove(0)
    yield engine.decode({1: draw(1)[0]})


def trees_verified(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    engine.add(0)
    engine.add(1)
    yield engine.prefill({0: draw(20), 1: draw(21)})
    trees = [[-1, 0, 0, 1, 1, 2], [-1, 0, -1, 1]]
    for leaves in ((3, 2), (5, -1), (0, 3)):
        yield engine.verify({0: draw(6), 1: draw(4)}, trees)
        engine.commit([0, 1], leaves)
    yield engine.decode({0: draw(1)[0], 1: draw(1)[0]})


def latent(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    """DeepSeek-V2: prompts expand keys and values, the rest absorbs; no step of two sequences (the
    model's batch_decode rotates every one as the first)."""
    engine.add(0)
    yield engine.prefill({0: draw(17)})
    yield engine.prefill({0: draw(28)}, extend=True)
    for _ in range(4):
        yield engine.decode({0: draw(1)[0]})
    engine.fork(0, 1, 20)
    engine.fork(0, 2)
    engine.pop(2, 5)
    yield engine.prefill({1: draw(6), 2: draw(2), 0: draw(1)}, extend=True)
    for seq_id in range(3):
        yield engine.decode({seq_id: draw(1)[0]})


def recurrent(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    """Qwen3.5: a step has the prompt of one sequence, as its recurrence runs over all the rows."""
    engine.add(0)
    engine.add(1)
    for seq_id, length in ((0, 20), (1, 40), (0, 7)):
        yield engine.prefill({seq_id: draw(length)})
    for _ in range(3):
        yield engine.decode({0: draw(1)[0], 1: draw(1)[0]})
    engine.fork(0, 2)
    yield engine.decode({seq_id: draw(1)[0] for seq_id in (2, 1, 0)})
    engine.pop(1, 2)
    engine.remove(0)
    yield engine.decode({1: draw(1)[0], 2: draw(1)[0]})
    yield engine.prefill({2: draw(5)})
    yield engine.decode({2: draw(1)[0]})


def shorter_than_windows(engine: Engine, draw: Callable[[int], list[int]]) -> Iterator[Array]:
    engine.add(0)
    engine.add(1)
    yield engine.prefill({0: draw(12), 1: draw(20)})
    yield engine.prefill({0: draw(6)})
    for _ in range(4):
        yield engine.decode({0: draw(1)[0], 1: draw(1)[0]})


def logits(library: Any, script: Script) -> list[Array]:
    rng = np.random.default_rng(0)
    engine = library if isinstance(library, Engine) else Engine(library)
    return list(script(engine, lambda n: rng.integers(0, VOCABULARY, n).tolist()))
