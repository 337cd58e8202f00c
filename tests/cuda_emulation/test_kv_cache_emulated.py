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

from cache_model import Dims, Twin, reference_attention, to_tvm

from tvm_flashinfer import jit, jit_cuda, kv_cache
from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.rope import RopeConfig

DIM = 32


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
    monkeypatch.setattr(kv_cache, "build_attention", build)
    monkeypatch.setattr(kv_cache, "load_kernel", lambda _artifact: kernel)


@pytest.fixture
def on_emulator(emulated_library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    take(emulated_library.emulated, monkeypatch)


@pytest.fixture
def late_stream(emulated_library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels and copies run when the library's ``flush`` says so."""
    take(emulated_library.deferred, monkeypatch)
    return emulated_library


def dims(**changes: Any) -> Dims:
    return Dims(head_dim=DIM, dtype="float16", **changes)


@pytest.mark.usefixtures("on_emulator")
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("form", ["token", "head", "fused"])
def test_prefill_append_and_decode(form: str, page_size: int) -> None:
    twin = Twin(dims(page_size=page_size))
    for seq_id in range(3):
        twin.add(seq_id)
    twin.forward([0, 1, 2], [33, 1, 17], form)
    twin.forward([2, 0], [5, 12], form)
    for _ in range(4):  # more steps than staging buffers
        twin.forward([1, 0, 2], [1, 1, 1], form)
    twin.forward([], [])
    twin.check()


@pytest.mark.usefixtures("on_emulator")
def test_fork_copies_the_shared_page() -> None:
    twin = Twin(dims())
    twin.add(0)
    twin.forward([0], [21])
    twin.fork(0, 1)
    twin.fork(0, 2, 18)
    twin.forward([0, 1, 2], [1, 2, 3])
    twin.pop(1, 5)
    twin.remove(0)
    twin.forward([2, 1], [1, 1])
    twin.check()


@pytest.mark.usefixtures("on_emulator")
@pytest.mark.parametrize("format", ["auto", "shared"])
def test_forks_read_their_prefix_once(format: str) -> None:
    """The tile grows until it holds the queries of all forks."""
    twin = Twin(dims(num_layers=1))
    twin.cache.use_format(format)
    twin.add(0)
    twin.forward([0], [60])
    twin.forward([0], [60])
    for child in range(1, 6):
        twin.fork(0, child, 120 if child % 2 else 100)
    for lengths in ([1] * 6, [1, 2, 1, 1, 3, 1], [1, 1, 1, 17, 1, 1]):
        twin.forward([1, 3, 5, 0, 2, 4], lengths)
        assert twin.cache.num_levels > 1
    twin.cache.use_format("flat")
    twin.forward([1, 3, 5, 0, 2, 4], [1] * 6)
    assert twin.cache.num_levels == 1
    twin.check()


@pytest.mark.usefixtures("on_emulator")
def test_windows_and_token_trees() -> None:
    twin = Twin(dims(sliding_window=True, num_layers=1))
    twin.add(0)
    twin.add(1)
    twin.enable_window(0, 24, 4)
    twin.forward([0, 1], [30, 9])
    twin.forward([0, 1], [1, 1])
    twin.forward([1], [5], trees=[[-1, 0, 0, 1, 2]])
    twin.commit([1], [3])
    twin.forward([0, 1], [1, 1])
    twin.check()


@pytest.mark.usefixtures("on_emulator")
def test_a_group_too_large_for_the_small_tile() -> None:
    twin = Twin(dims(num_qo_heads=20, num_kv_heads=1, num_layers=1))
    twin.add(0)
    twin.forward([0], [20])
    twin.forward([0], [1])
    twin.check()


@pytest.mark.usefixtures("on_emulator")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, DIM])
def test_rope_is_fused_into_the_append(rotary_dim: int, interleaved: bool) -> None:
    rope = RopeConfig(theta=100.0, rotary_dim=rotary_dim, interleaved=interleaved)
    cache = KVCache.create(
        num_layers=1,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=DIM,
        max_total_seq_len=64,
        max_batch_size=2,
        prefill_chunk_size=32,
        dtype="float16",
        rope=rope,
    )
    rng = np.random.default_rng(0)
    cache.add_sequence(0)
    keys, values = np.zeros((0, 2, DIM)), np.zeros((0, 2, DIM))
    for count in (20, 1, 1):
        q, k, v = (
            rng.standard_normal((count, heads, DIM)).astype(np.float16) for heads in (4, 2, 2)
        )
        out = to_tvm(np.full((count, 4, DIM), np.nan, np.float16))
        with cache.step([0], [count]):
            cache.attention(0, to_tvm(q), to_tvm(k), to_tvm(v), out)
        positions = np.arange(len(keys), len(keys) + count)
        keys = np.concatenate([keys, rotate(k, positions, rope)])
        values = np.concatenate([values, v.astype(np.float64)])
        expected = reference_attention(rotate(q, positions, rope), keys, values)
        np.testing.assert_allclose(out.numpy(), expected, atol=4e-3)


def rotate(x: np.ndarray, positions: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """[tokens, heads, dim] by float64 angles."""
    frequencies, magnitude = rope.resolve(x.shape[-1])
    pairs = len(frequencies)
    angles = positions[:, None, None] * frequencies.astype(np.float64)
    first = slice(0, 2 * pairs, 2) if rope.interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if rope.interleaved else slice(pairs, 2 * pairs)
    out = x.astype(np.float64)
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = (a * np.cos(angles) - b * np.sin(angles)) * magnitude
    out[..., second] = (b * np.cos(angles) + a * np.sin(angles)) * magnitude
    return out


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
