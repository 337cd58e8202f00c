# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""InjectAttention for CUDA: what a graph becomes, its kernels on the emulator, and an exported
library with device code."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tables import emulated_table
from tvm import relax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "relax_passes"))

from graphs import Graph, build, tensor

from relax_passes.inject import InjectAttention, InjectError
from relax_passes.report import Report
from relax_passes.targets import resolve_target
from tvm_flashinfer.jit import AttentionSpec, KernelArtifact

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 3, 4, 2, 21, 16
CUDA = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})


def heads_outside(batch: Any = BATCH, length: Any = LENGTH, dim: int = DIM) -> tvm.IRModule:
    """q, k and v [B, H, S, D]: queries do not lie evenly through the batch."""

    def body(g: Graph, q: Any, k: Any, v: Any, slope: Any) -> Any:
        return attend(g, q, k, v, slope, batch, length, dim)

    shapes = [(batch, heads, length, dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    operands = [tensor(n, *s, dtype="float16") for n, s in zip("qkv", shapes, strict=True)]
    return tvm.IRModule({"main": build(body, *operands, tensor("slope", HEADS))})


def heads_inside() -> tvm.IRModule:
    """One tensor [B, S, (H + 2 Hkv) D] of all three, and tokens first in the result."""

    def body(g: Graph, qkv: Any, slope: Any) -> Any:
        parts, at = [], 0
        for heads in (HEADS, KV_HEADS, KV_HEADS):
            part = g.strided_slice(qkv, [2], [at * DIM], [(at + heads) * DIM])
            split = g.reshape(part, [BATCH, LENGTH, heads, DIM])
            parts.append(g.permute_dims(split, [0, 2, 1, 3]))
            at += heads
        out = attend(g, *parts, slope, BATCH, LENGTH, DIM)
        return g.reshape(g.permute_dims(out, [0, 2, 1, 3]), [BATCH, LENGTH, HEADS * DIM])

    width = (HEADS + 2 * KV_HEADS) * DIM
    qkv = tensor("qkv", BATCH, LENGTH, width, dtype="float16")
    return tvm.IRModule({"main": build(body, qkv, tensor("slope", HEADS))})


def attend(
    g: Graph, q: Any, k: Any, v: Any, slope: Any, batch: Any, length: Any, dim: int
) -> relax.Var:
    """Causal, with ALiBi, grouped heads."""

    def grouped(x: Any) -> Any:
        x = g.expand_dims(x, 2)
        x = g.broadcast_to(x, [batch, KV_HEADS, HEADS // KV_HEADS, length, dim])
        return g.reshape(x, [batch, HEADS, length, dim])

    k, v = grouped(k), grouped(v)
    x = g.astype(g.matmul(q, g.permute_dims(k, [0, 1, 3, 2])), "float32")
    x = g.multiply(x, relax.const(1 / math.sqrt(dim), "float32"))
    numbers = g.arange(0, length, 1, "int64")
    query, key = g.expand_dims(numbers, 1), g.expand_dims(numbers, 0)
    distance = g.astype(g.subtract(key, query), "float32")
    x = g.add(x, g.multiply(g.reshape(slope, [1, HEADS, 1, 1]), distance))
    x = g.where(g.less_equal(key, query), x, relax.const(-math.inf, "float32"))
    return g.matmul(g.astype(g.softmax(x), "float16"), v)


def inject(mod: tvm.IRModule, **options: Any) -> tuple[tvm.IRModule, list[AttentionSpec]]:
    specs: list[AttentionSpec] = []

    def made(spec: AttentionSpec) -> KernelArtifact:
        specs.append(spec)
        return KernelArtifact("", "", "tvm_flashinfer_emulated_graph_kernel")

    return InjectAttention(target=CUDA, strict=True, build=made, **options)(mod), specs


def run(mod: tvm.IRModule, tables: Path, *inputs: np.ndarray) -> np.ndarray:
    """The injected module on the CPU, its kernel on the emulator."""
    new, (spec,) = inject(mod)
    table = emulated_table(tables, spec, (16, 64))
    tvm_ffi.register_global_func("tvm_flashinfer_emulated_graph_kernel", table, override=True)
    executable = tvm.compile(new, target=resolve_target("native"))
    vm = relax.VirtualMachine(executable, tvm.cpu())
    out = [vm["main"](*map(tvm.runtime.tensor, inputs)).numpy() for _ in range(2)]
    assert (out[0] == out[1]).all()
    return out[0]


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """[B, H, S, D] in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HEADS // KV_HEADS, 1) for x in (k, v))
    i, j = np.indices((LENGTH, LENGTH))
    x = q @ k.swapaxes(2, 3) / math.sqrt(DIM) + slope[:, None, None] * (j - i)
    x = np.where(j <= i, x, -np.inf)
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graph_tables")


@pytest.fixture(scope="module")
def operands() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = [(BATCH, heads, LENGTH, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return (
        *(rng.standard_normal(s).astype(np.float16) for s in shapes),
        (2.0 ** -np.arange(1, HEADS + 1)).astype(np.float32),
    )


def test_a_batch_whose_heads_lie_outside_its_tokens(tables: Path, operands: Any) -> None:
    out = run(heads_outside(), tables, *operands)
    np.testing.assert_allclose(out, expected(*operands), atol=4e-3)


def test_a_batch_read_and_written_in_place(tables: Path, operands: Any) -> None:
    *qkv, slope = operands
    merged = np.concatenate([x.transpose(0, 2, 1, 3).reshape(BATCH, LENGTH, -1) for x in qkv], -1)
    mod = heads_inside()
    text = inject(mod)[0].script()
    assert "permute_dims" not in text
    assert "queries" not in text
    out = run(mod, tables, merged, slope)
    want = expected(*qkv, slope).transpose(0, 2, 1, 3).reshape(BATCH, LENGTH, -1)
    np.testing.assert_allclose(out, want, atol=4e-3)


def test_what_cuda_kernels_do_not_take() -> None:
    report = Report()
    wide = InjectAttention(target=CUDA, report=report)(heads_outside(dim=12))
    assert "graph_attention" not in wide.script()
    assert report.sites[0].reason == "head_dim_qk is 12, expected a multiple of 8 from 8 to 576"
    with pytest.raises(InjectError, match="head_dim_qk is 24, CUDA kernels take multiples of 16"):
        InjectAttention(target=CUDA, strict=True)(heads_outside(dim=24))
    metal = tvm.target.Target("metal")
    with pytest.raises(InjectError, match=r"the target is metal; .* for llvm and cuda targets"):
        InjectAttention(target=metal, strict=True)(heads_outside())


def test_requests_must_lie_evenly(tables: Path, operands: Any) -> None:
    """The runtime says so, if a caller has no pass to see to it."""
    _, (spec,) = inject(heads_outside())
    attention = tvm.get_global_func("tvm_flashinfer.graph_attention")
    table = emulated_table(tables, spec, (16, 64))
    q, k, v, slope = (tvm.runtime.tensor(x) for x in operands)
    out = tvm.runtime.empty(operands[0].shape, "float16")
    step = LENGTH * DIM
    outside = [0, HEADS * step, step, DIM]
    kv = [0, KV_HEADS * step, step, DIM]
    layout = [BATCH, LENGTH, LENGTH, 0, HEADS, KV_HEADS, *outside, *kv, *kv, *outside]
    with pytest.raises(ValueError, match="requests of argument `q` lie 1344 elements apart"):
        attention(table, tvm_ffi.Shape(layout), 1.0, q, k, v, slope, out)


def test_an_exported_library_holds_device_code(tmp_path: Path) -> None:
    """Compiled ahead of time by nvcc, without a GPU."""
    from relax_passes.pipeline_cuda import lower_pipeline, toolchain
    from tvm_flashinfer.jit import CompilerError
    from tvm_flashinfer.jit_cuda import find_nvcc

    try:
        find_nvcc()
    except CompilerError:
        pytest.skip("no nvcc")
    mod = InjectAttention(target=CUDA, strict=True)(heads_outside())
    with toolchain(CUDA):
        executable = tvm.compile(
            mod, target=CUDA, relax_pipeline=lower_pipeline(CUDA, capture=False)
        )
    library = tmp_path / "model.so"
    executable.export_library(str(library))
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "__tvm_ffi_tvm_flashinfer_cuda_" in symbols
