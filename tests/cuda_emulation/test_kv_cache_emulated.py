# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The KV cache's CUDA backend on a CPU: plans, staging, append and attention through a kernel table
that runs on the emulator, against the same model as the CPU's own backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from harness.build import EMULATOR, INCLUDE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kv_cache"))

from cache_model import reference_attention, to_tvm
from cuda_scenarios import *  # noqa: F403  (its tests are collected here)
from tables import emulated_table

from tvm_flashinfer import _kv_kernels, jit, jit_cuda
from tvm_flashinfer.kv_cache import KVCache

DIM = 32


@pytest.fixture(scope="module")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernel_tables")


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernel table that nvcc would compile, made by the host compiler, and a late stream."""
    import tvm_ffi
    from tvm_ffi import libinfo

    folder = tmp_path_factory.mktemp("kernel_table")
    spec = jit.AttentionSpec("float16", "float16", DIM, DIM)
    (folder / "table.cc").write_text(jit_cuda.kernel_source(spec, "emulated_table"))
    (folder / "glue.cc").write_text(jit_cuda.glue_source("emulated", "emulated_table"))
    library = folder / "kernel.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g0", "-fPIC", "-shared"]
    command += ["-fvisibility=hidden", "-DTVM_FLASHINFER_CUDA_EMULATION", "-o", str(library)]
    include = [INCLUDE, EMULATOR, *libinfo.include_paths()]
    sources = [str(folder / name) for name in ("table.cc", "glue.cc")]
    sources.append(str(Path(__file__).with_name("deferred_table.cc")))
    subprocess.run([*command, *(f"-I{path}" for path in include), *sources], check=True)
    return tvm_ffi.load_module(str(library))


def take(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache made in the test takes this kernel."""
    build: Callable[..., None] = lambda *_args, **_options: None  # noqa: E731
    monkeypatch.setattr(_kv_kernels, "build_attention", build)
    monkeypatch.setattr(_kv_kernels, "load_kernel", lambda _artifact: kernel)


@pytest.fixture
def cuda_kernels(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache made in the test takes CUDA kernels, on the emulator."""
    build: Callable[..., Any] = lambda spec, **_options: spec  # noqa: E731
    monkeypatch.setattr(_kv_kernels, "build_attention", build)
    monkeypatch.setattr(
        _kv_kernels, "load_kernel", lambda spec: emulated_table(kernel_folder, spec)
    )


@pytest.fixture
def late_stream(emulated_library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels and copies run when the library's ``flush`` says so."""
    take(emulated_library.deferred, monkeypatch)
    return emulated_library


def test_steps_begin_while_others_are_in_flight(late_stream: Any) -> None:
    """Nothing that a launched kernel or copy is still to read is overwritten: neither plans, nor
    the page of a fork before it is copied."""
    cache = KVCache.create(
        num_layers=2,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=DIM,
        max_total_seq_len=256,
        max_batch_size=4,
        prefill_chunk_size=32,
        page_size=5,
        dtype="float16",
    )
    rng = np.random.default_rng(0)
    tokens: dict[int, list[np.ndarray]] = {}
    checks: list[tuple[Any, np.ndarray, np.ndarray]] = []
    alive: list[Any] = []  # as a framework keeps operands until their stream has passed

    def step(batch: dict[int, int]) -> None:
        n = sum(batch.values())
        pending = late_stream.pending()
        with cache.step(list(batch), list(batch.values())):
            assert checks == [] or late_stream.pending() > 0, "the last step ran already"
            for layer in range(2):
                q, k, v = (
                    rng.standard_normal((n, heads, DIM)).astype(np.float16) for heads in (4, 2, 2)
                )
                out = to_tvm(np.full((n, 4, DIM), np.nan, np.float16))
                operands = [to_tvm(x) for x in (q, k, v)]
                alive.extend(operands)
                cache.attention(layer, *operands, out)
                at = 0
                for seq_id, count in batch.items():
                    new = slice(at, at + count)
                    at += count
                    past = tokens[seq_id][layer]
                    tokens[seq_id][layer] = np.concatenate([past, np.stack([k[new], v[new]])], 1)
                    expected = reference_attention(q[new], *tokens[seq_id][layer])
                    checks.append((out, np.arange(n)[new], expected))
                assert np.isnan(out.numpy()).all(), "it ran at once: nothing is in flight"
        assert late_stream.pending() > 0 or pending == 0

    for seq_id in range(3):
        cache.add_sequence(seq_id)
        tokens[seq_id] = [np.zeros((2, 0, 2, DIM), np.float16) for _ in range(2)]
    step({0: 13, 1: 4, 2: 1})
    for _ in range(7):  # more than there are staging buffers
        step({0: 1, 1: 1, 2: 1})
    cache.fork_sequence(0, 3)
    tokens[3] = list(tokens[0])
    step({3: 2, 0: 1})
    step({1: 12, 3: 1})
    cache.remove_sequence(0)
    cache.fork_sequence(1, 0, 7)
    tokens[0] = [kv[:, :7] for kv in tokens[1]]
    step({0: 9, 2: 3})
    assert late_stream.pending() > 0
    # Looking into the cache waits for what it reads.
    expected = tokens[2][1]
    found = [tvm.runtime.empty((2, expected.shape[1], 2, DIM), "float16") for _ in range(2)]
    cache.get_kv(2, 0, expected.shape[1], *found)
    assert (np.stack([x.numpy()[1] for x in found]) == expected).all()
    assert late_stream.pending() == 0
    for out, rows, expected in checks:
        np.testing.assert_allclose(out.numpy()[rows], expected, atol=4e-3)
