# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Timing by CUDA graph replays: medians, over inputs that rotate through more than the L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def microseconds(
    launches: Sequence[Callable[[], object]], samples: int = 15, rest: float = 0.0
) -> float:
    """Median time of one launch, of a graph that holds all `launches` in order.

    `rest`: seconds of idling before each replay, so that dense work is measured before the power
    limit slows the clock.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    times = []
    with torch.cuda.stream(stream):
        for i in range(samples + 2):
            if rest > 0:
                stream.synchronize()
                time.sleep(rest)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if i >= 2:
                times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)
