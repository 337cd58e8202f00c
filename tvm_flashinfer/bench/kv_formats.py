"""What the cache's choice of a format costs and gains: the chosen one beside those it left."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from ..kv_cache import KVCache
from .kv_subject import (
    DIM,
    GENERATION_LAYERS,
    HEADS,
    PAGE,
    PEER,
    Subject,
    add_row,
    caches,
    kv_bytes,
)
from .machine import read_bandwidth
from .suites import Context
from .timing import REST, Call, clock_of, measure


def _formatted(subject: Subject, seq_ids: Sequence[int], name: str) -> Call:
    """A step in a format of that name."""
    decode = subject.decode(seq_ids)

    def call(turn: int) -> None:
        subject.cache.use_format(name)
        decode(turn)

    return call


def parallel_generation(context: Context, n: int, prompt: int, suffix: int) -> None:
    """One prompt and n children that grow: latency between tokens, over the whole growth."""
    case = f"parallel generation, prompt {prompt}, n {n}"
    if not context.wants(case):
        return
    context.progress(case)
    subjects = caches(HEADS, n + 1, prompt + (n + 1) * (suffix + PAGE), GENERATION_LAYERS)
    children = list(range(1, n + 1))
    for subject in subjects.values():
        subject.cache.add_sequence(0)
        subject.fill(0, prompt)
        for child in children:
            subject.cache.fork_sequence(0, child)
    ours = subjects["ours"]
    contenders = {
        "ours": _formatted(ours, children, "auto"),
        "ours, flat": _formatted(ours, children, "flat"),
        PEER: subjects[PEER].decode(children),
    }
    stops = 4
    bandwidth = read_bandwidth(context.threads)
    totals = dict.fromkeys(contenders, 0.0)
    floor, samples = 0.0, 0
    for stop in range(stops + 1):
        seconds, taken = measure(contenders, REST, clock_of(context.threads))
        samples += taken
        # Trapezoids over the growth: a child spends as long between two stops.
        share = (0.5 if stop in (0, stops) else 1.0) / stops
        for name, value in seconds.items():
            totals[name] += share * value * 1e3
        tokens = prompt + n * (suffix * stop // stops + 1)
        floor += share * 1e3 * kv_bytes(HEADS, tokens, GENERATION_LAYERS) / bandwidth
        if stop < stops:
            for subject in subjects.values():
                for child in children:
                    subject.fill(child, suffix // stops)
    metric = f"attention of {GENERATION_LAYERS} layers between tokens"
    add_row(context, case, metric, "ms", totals, floor, samples)


@dataclasses.dataclass
class Prompts:
    """Sequences as a shape makes them: forks share what their parent had."""

    subject: Subject
    seq_ids: list[int] = dataclasses.field(default_factory=list)  #: that take part in steps
    _next: int = 0

    def new(self, length: int) -> int:
        """A sequence of so many tokens, that takes no part."""
        seq_id = self._next
        self._next += 1
        self.subject.cache.add_sequence(seq_id)
        self._fill(seq_id, length)
        return seq_id

    def fork(self, parent: int, length: int) -> int:
        """A fork with so many tokens of its own, that takes no part."""
        seq_id = self._next
        self._next += 1
        self.subject.cache.fork_sequence(parent, seq_id)
        self._fill(seq_id, length)
        return seq_id

    def _fill(self, seq_id: int, length: int) -> None:
        for begin in range(0, length, 4096):
            self.subject.fill(seq_id, min(4096, length - begin))

    def take(self, *seq_ids: int) -> None:
        self.seq_ids += seq_ids


@dataclasses.dataclass(frozen=True)
class Shape:
    """Who shares what with whom."""

    name: str
    tokens: int  #: in the pool
    batch: int  #: sequences, those that take no part included
    make: Callable[[Prompts], None]


def tree(*levels: tuple[int, int]) -> Shape:
    """``(children, tokens of each)`` for every level; the last one's sequences are the batch."""

    def make(prompts: Prompts) -> None:
        def grow(parent: int | None, level: int) -> None:
            count, length = levels[level]
            for _ in range(count):
                seq_id = prompts.new(length) if parent is None else prompts.fork(parent, length)
                if level + 1 < len(levels):
                    grow(seq_id, level + 1)
                else:
                    prompts.take(seq_id)

        grow(None, 0)

    tokens, nodes, at_level = 0, 0, 1
    for count, length in levels:
        at_level *= count
        nodes += at_level
        tokens += at_level * (length + PAGE)
    name = " of ".join(f"{count}x{length}" for count, length in reversed(levels))
    return Shape(name, tokens, nodes, make)


def one_longer(prompt: int, count: int, suffix: int, longest: int) -> Shape:
    def make(prompts: Prompts) -> None:
        parent = prompts.new(prompt)
        for child in range(count):
            prompts.take(prompts.fork(parent, longest if child == count // 2 else suffix))

    name = f"{count} of {prompt}, suffixes {suffix}, one {longest}"
    return Shape(name, prompt + count * (suffix + PAGE) + longest, count + 1, make)


def beside(prompt: int, count: int, suffix: int, alone: int) -> Shape:
    """Sharers and sequences that share nothing, in turns."""

    def make(prompts: Prompts) -> None:
        parent = prompts.new(prompt)
        for _ in range(count):
            prompts.take(prompts.fork(parent, suffix), prompts.new(alone))

    name = f"{count}x{suffix} of {prompt} and {count}x{alone} alone, in turns"
    return Shape(name, prompt + count * (suffix + alone + 2 * PAGE), 2 * count + 1, make)


def two_prompts(prompt: int, count: int, suffix: int) -> Shape:
    """Forks of two prompts, in turns: sharers aren't neighbours."""

    def make(prompts: Prompts) -> None:
        parents = [prompts.new(prompt) for _ in range(2)]
        for _ in range(count):
            prompts.take(*(prompts.fork(parent, suffix) for parent in parents))

    name = f"2 x {count}x{suffix} of {prompt}, in turns"
    return Shape(name, 2 * (prompt + count * (suffix + PAGE)), 2 * (count + 1), make)


SHAPES = (
    tree((16, 1024)),  # nothing is shared
    tree((1, 64), (2, 2048)),  # what is shared is short
    tree((1, 256), (2, 256)),
    tree((1, 128), (32, 512)),  # a system prompt
    tree((1, 512), (8, 256)),
    tree((1, 2048), (4, 128)),
    tree((1, 2048), (16, 128)),
    tree((1, 2048), (64, 16)),
    tree((1, 32768), (64, 32)),
    tree((2, 1024), (4, 512), (4, 64)),  # nested
    tree((1, 64), (4, 64), (4, 1024)),
    tree((1, 1024), (2, 16), (2, 16), (2, 16)),
    one_longer(1024, 8, 16, 8192),
    one_longer(4096, 4, 64, 2048),
    beside(1024, 8, 128, 1024),
    two_prompts(1024, 8, 128),
)


def formats(context: Context, shapes: Sequence[Shape] = SHAPES) -> None:
    """Steps in the chosen format, flat, and with every prefix shared.

    A row's peers are the formats; the last row says how far the choice was ever behind flat.
    """
    behind: dict[str, float] = {}
    for shape in shapes:
        case = f"formats, {shape.name}"
        if not context.wants(case):
            continue
        context.progress(case)
        cache = KVCache.create(
            num_layers=1,
            num_qo_heads=HEADS[0],
            num_kv_heads=HEADS[1],
            head_dim=DIM,
            page_size=PAGE,
            max_batch_size=shape.batch,
            max_total_seq_len=shape.tokens + 2 * PAGE * shape.batch,
            prefill_chunk_size=4096,
        )
        subject = Subject(cache, HEADS)
        prompts = Prompts(subject)
        shape.make(prompts)
        names = {"ours": "auto", "flat": "flat", "shared": "shared"}
        calls = {label: _formatted(subject, prompts.seq_ids, name) for label, name in names.items()}
        times = _in_turns(calls, context.threads)
        medians = {label: 1e3 * statistics.median(values) for label, values in times.items()}
        # Of turns, in which both met the same machine.
        ratios = [a / b for a, b in zip(times["ours"], times["flat"], strict=True)]
        behind[case] = statistics.median(ratios)
        add_row(context, case, "attention step", "ms", medians, None, len(ratios))
        best = min(medians["flat"], medians["shared"])
        for metric, ratio in (
            ("chosen over flat", behind[case]),
            ("chosen over best", medians["ours"] / best),
        ):
            add_row(context, case, metric, "%", {"ours": 100 * ratio}, None, len(ratios))
    if behind:
        worst = {"ours": 100 * max(behind.values())}
        add_row(context, "formats, the worst", "chosen over flat", "%", worst, None, len(behind))


def _in_turns(calls: dict[str, Call], threads: int, seconds: float = 4.0) -> dict[str, list[float]]:
    """Seconds of each call in every turn; who begins changes from turn to turn."""
    clock = clock_of(threads)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    deadline = time.perf_counter() + seconds
    order = list(calls)
    while len(times[order[0]]) < 10 or time.perf_counter() < deadline:
        for name in order:
            start = clock()
            calls[name](0)
            times[name].append(clock() - start)
        order = order[1:] + order[:1]
    return times
