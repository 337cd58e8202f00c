# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Attention inside a stateless graph on a real device: a torch model that InjectAttention compiled,
and plans under capture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness.runtime import load as load_runtime
from kernels import KERNELS, Kernel, load
from modules import FOLDER

tvm = load_runtime()
LIBRARY = FOLDER / "models" / "injected.so"


@pytest.mark.skipif(not LIBRARY.is_file(), reason="no compiled models: scripts/gpu_bundle.sh")
def test_a_torch_model_with_derived_variants() -> None:
    """Grouped heads; soft-cap, ALiBi and a window; a mask, with heads outside tokens."""
    import tvm_ffi
    from tvm.runtime.vm import VirtualMachine

    with np.load(LIBRARY.with_suffix(".npz")) as data:
        inputs = [torch.from_numpy(data[f"in{n}"]).cuda() for n in range(3)]
        expected = [data[f"out{n}"] for n in range(2)]
    vm = VirtualMachine(tvm.runtime.load_module(str(LIBRARY)), tvm.cuda(0))
    torch.cuda.synchronize()
    outs = [
        [torch.from_dlpack(o).clone() for o in vm["main"](*map(tvm_ffi.from_dlpack, inputs))]
        for _ in range(2)
    ]
    torch.cuda.synchronize()
    for first, second, want in zip(*outs, expected, strict=True):
        assert torch.equal(first, second)
        error = np.linalg.norm(first.double().cpu().numpy() - want) / np.linalg.norm(want)
        assert error < 4e-3


class Even:
    """Operands [B, S, H, D] of the compiled causal kernel."""

    def __init__(self, batch: int, length: int, heads: int = 6, kv_heads: int = 2) -> None:
        self.shape = batch, length, heads, kv_heads
        self.q, self.k, self.v = (
            torch.randn(batch, length, n, 64, dtype=torch.float16, device="cuda")
            for n in (heads, kv_heads, kv_heads)
        )
        self.out = torch.empty_like(self.q)

    def run(self, kernel: Any) -> None:
        import tvm_ffi

        batch, length, heads, kv_heads = self.shape

        def strides(n: int) -> list[int]:
            return [0, length * n * 64, 64, n * 64]

        spec = [batch, length, length, 0, heads, kv_heads, *strides(heads)]
        spec += [*strides(kv_heads) * 2, *strides(heads)]
        operands = [tvm_ffi.from_dlpack(x) for x in (self.q, self.k, self.v, self.out)]
        stream = torch.cuda.current_stream().cuda_stream
        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda:0"), stream):
            tvm.get_global_func("tvm_flashinfer.graph_attention")(
                kernel, tvm_ffi.Shape(spec), 0.125, *operands
            )

    def expected(self) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2).double() for x in (self.q, self.k, self.v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def close(self) -> None:
        expected = self.expected()
        assert (self.out.double() - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.skipif(not KERNELS.is_dir(), reason="no kernels: scripts/gpu_bundle.sh")
def test_plans_that_a_graph_runs_stay() -> None:
    kernel = load(Kernel("causal"))
    captured = Even(3, 200)
    captured.run(kernel)
    torch.cuda.synchronize()
    captured.close()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run(kernel)
    for length in range(1, 80):  # more shapes than plans are kept
        other = Even(2, length)
        other.run(kernel)
        if length % 13 == 0:
            torch.cuda.synchronize()
            other.close()
    for x in (captured.q, captured.k, captured.v):
        x.normal_()
    captured.out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    captured.close()
