"""Caches in several threads, and beside processes that compile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_model import Dims, Twin, reference_attention, to_tvm
from test_nn import DIM, KV_HEADS, QUERY_HEADS, Model, compiled
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode

from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.nn import PagedKVCache

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


COMPILE_MODULE = """
import sys
sys.path[:0] = sys.argv[1:]
from test_nn import SCALINGS, Model, compiled
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode
from tvm_flashinfer.nn import PagedKVCache
vm = compiled(Model(PagedKVCache, SCALINGS["yarn"], rope_mode=RopeMode.INLINE))
assert vm["create"]() is not None
"""


def vm_steps(vm: Any, rng: np.random.Generator) -> None:
    """A model's own cache, driven from the VM: prefill and decode, compared with NumPy."""
    cache = KVCache(vm["create"]())
    k, v = (np.zeros((0, KV_HEADS, DIM), np.float32) for _ in range(2))
    cache.add_sequence(0)
    for length in (33, 1, 1, 5):
        qkv = rng.standard_normal((1, length, QUERY_HEADS + 2 * KV_HEADS, DIM), np.float32)
        with cache.step([0], [length]):
            out = vm["forward"](to_tvm(qkv), cache.handle).numpy()
        q, new_k, new_v = np.split(qkv[0], [QUERY_HEADS, QUERY_HEADS + KV_HEADS], 1)
        k, v = np.concatenate([k, new_k]), np.concatenate([v, new_v])
        np.testing.assert_allclose(
            out.reshape(q.shape), reference_attention(q, k, v), rtol=1e-4, atol=1e-5
        )


def test_the_vm_steps_while_a_process_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one compiles a Relax module and its kernels, into the kernel cache of this one."""
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", str(tmp_path))
    vm = compiled(Model(PagedKVCache, {}, rope_mode=RopeMode.NONE))
    kernels = len(list(tmp_path.rglob("kernel.so")))
    folders = [str(folder) for folder in (Path(__file__).parent, Path(__file__).parents[1])]
    compiler = subprocess.Popen([sys.executable, "-c", COMPILE_MODULE, *folders])
    rng = np.random.default_rng(0)
    rounds = 0
    while compiler.poll() is None:
        vm_steps(vm, rng)
        rounds += 1
    assert compiler.returncode == 0
    assert rounds > 1
    assert len(list(tmp_path.rglob("kernel.so"))) > kernels
