"""Caches in several threads, and beside processes that compile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from cache_model import Dims, Twin

ROUNDS = 6


def drive(twin: Twin, failures: list[BaseException]) -> None:
    """Prefill, forks, trees and decode, each step compared with the model."""
    try:
        for i in range(ROUNDS):
            for seq_id, length in ((0, 33), (1, 7 + i)):
                twin.add(seq_id)
                twin.forward([seq_id], [length])
            twin.fork(0, 2, 20)
            twin.forward([0, 1, 2], [1, 1, 1])
            twin.forward([1], [3], trees=[[-1, -1, 1]])
            twin.commit([1], [2])
            twin.check()
            for seq_id in (0, 1, 2):
                twin.remove(seq_id)
    except BaseException as error:
        failures.append(error)


def test_two_caches_in_two_threads() -> None:
    """They share the thread pool, the kernels and the library, and nothing else."""
    twins = [Twin(seed=1), Twin(Dims(dtype="float16", page_size=5), seed=2)]
    failures: list[BaseException] = []
    threads = [threading.Thread(target=drive, args=(twin, failures)) for twin in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


COMPILE = """
from tvm_flashinfer.jit import AttentionSpec, build_attention, load_kernel
load_kernel(build_attention(AttentionSpec("float32", "float32", 8, 8, "full")))
"""


def test_a_cache_goes_on_while_processes_compile(tmp_path: Path) -> None:
    """Two compile the same kernel: the second waits for the first, and takes what it made."""
    environment = os.environ | {"TVM_FFI_CACHE_DIR": str(tmp_path)}
    twin = Twin()
    compilers = [
        subprocess.Popen([sys.executable, "-c", COMPILE], env=environment) for _ in range(2)
    ]
    failures: list[BaseException] = []
    while any(compiler.poll() is None for compiler in compilers):
        drive(twin, failures)
        assert not failures, failures
    assert [compiler.returncode for compiler in compilers] == [0, 0]
    assert len(list(tmp_path.rglob("kernel.so"))) == 1
