"""Contenders timed in turns, so that whatever else the machine does meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["REST", "Call", "clock_of", "measure"]

#: What is timed: called with the number of the turn, by which it may choose its data.
Call = Callable[[int], object]

#: A contender that takes longer than this for a call, in seconds, is measured once.
SLOW = 2.0
#: Rest that lets the threads of the contender before fall asleep.
REST = 0.02
#: Seconds for each contender, if that many turns are not enough.
BUDGET = 0.5
FEWEST_TURNS, MOST_TURNS = 5, 200


def clock_of(threads: int) -> Callable[[], float]:
    """What to read seconds from: with one thread its own time, which leaves out what else runs on
    its core. Waiting for memory counts."""
    return time.thread_time if threads == 1 else time.perf_counter


def measure(
    contenders: Mapping[str, Call],
    rest: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, float], int]:
    """Median seconds of a call by contender, and how many samples each is of.

    ``rest``: seconds of sleep before each call, for contenders with threads of their own. The pool
    of the one before (OpenMP's, say) goes on spinning for a few milliseconds, on a core that the
    next one needs.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    slow = set()
    for name, call in contenders.items():
        start, begin = time.perf_counter(), clock()
        call(0)  # the first call compiles, loads or allocates; it counts if there is no other
        times[name].append(clock() - begin)
        if time.perf_counter() - start > SLOW:
            slow.add(name)
        else:
            times[name].clear()
    deadline = time.perf_counter() + (BUDGET + 10 * rest) * len(contenders)
    turn = 0
    while turn < FEWEST_TURNS or (turn < MOST_TURNS and time.perf_counter() < deadline):
        for name, call in contenders.items():
            if name not in slow:
                time.sleep(rest)
                start = clock()
                call(turn)
                times[name].append(clock() - start)
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}, turn
