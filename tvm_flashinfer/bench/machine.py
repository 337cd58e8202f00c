"""What the machine is, and how fast it can possibly be: the floors of every benchmark."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["describe", "matmul_rate", "read_bandwidth", "versions"]


def describe(threads: int) -> dict[str, Any]:
    """CPU, threads and system."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of everything that takes part."""
    found = {}
    for name in ("tvm-flashinfer", "apache-tvm", "apache-tvm-ffi", "numpy", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_bandwidth(threads: int, megabytes: int = 256) -> float:
    """Bytes per second that ``threads`` threads read from memory: the best of several readings."""
    values = np.ones(megabytes * 2**18, np.float32)
    parts = np.array_split(values, threads)
    readers: tuple[Callable[[Any], Any], ...] = (
        np.ndarray.max,
        lambda part: part.view(np.int64).sum(),
        lambda part: np.dot(part, part),
    )
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for reader in readers:
            for _ in range(4):
                start = time.perf_counter()
                list(pool.map(reader, parts))
                best = max(best, values.nbytes / (time.perf_counter() - start))
    return best


def matmul_rate(size: int = 1024) -> float:
    """Float32 FLOP/s of a square matrix product in numpy's BLAS, on as many threads as it takes."""
    a = np.ones((size, size), np.float32)
    out = np.empty_like(a)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        np.matmul(a, a, out=out)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
