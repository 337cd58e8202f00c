# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The CUDA linear layer of a single row, on the emulator."""

from __future__ import annotations

import ctypes
import os
import subprocess

import ml_dtypes
import numpy as np
import pytest
from harness.build import EMULATOR, INCLUDE

SOURCE = """#include <tvm_flashinfer/cuda/linear_row.cuh>
using namespace tvm_flashinfer;
template <typename T>
void Run(const void* x, const void* w, const void* bias, void* out, int64_t n, int64_t k,
         int wide) {
  const cuda::LinearRowParams p{x, w, bias, out, n, static_cast<int32_t>(k / 8)};
  wide ? cuda::RunLinearRow<T, float>(p, nullptr) : cuda::RunLinearRow<T, T>(p, nullptr);
}
extern "C" void run_float16(const void* x, const void* w, const void* bias, void* out, int64_t n,
                            int64_t k, int wide) {
  Run<Float16>(x, w, bias, out, n, k, wide);
}
extern "C" void run_bfloat16(const void* x, const void* w, const void* bias, void* out, int64_t n,
                             int64_t k, int wide) {
  Run<BFloat16>(x, w, bias, out, n, k, wide);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("linear_row")
    (folder / "row.cc").write_text(SOURCE)
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall"]
    command += ["-DTVM_FLASHINFER_CUDA_EMULATION", f"-I{INCLUDE}", f"-I{EMULATOR}"]
    command += ["-o", str(folder / "row.so"), str(folder / "row.cc")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "row.so"))


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 16 bytes."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 16, np.uint8)
    begin = -raw.ctypes.data % 16
    return raw[begin : begin + size].view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n", [1, 17, 40])
@pytest.mark.parametrize("k", [8, 1032, 2048])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row(
    library: ctypes.CDLL, dtype: str, n: int, k: int, wide: bool, with_bias: bool
) -> None:
    rng = np.random.default_rng(n + k)
    narrow = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    out_dtype = np.dtype(np.float32) if wide else narrow
    x, w = aligned((k,), narrow), aligned((n, k), narrow)
    x[:], w[:] = rng.standard_normal(k), rng.standard_normal((n, k))
    bias, out = aligned((n,), out_dtype), aligned((n,), out_dtype)
    bias[:], out[:] = rng.standard_normal(n), np.nan
    getattr(library, f"run_{dtype}")(
        *(ctypes.c_void_p(a.ctypes.data) for a in (x, w)),
        ctypes.c_void_p(bias.ctypes.data if with_bias else None),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(n),
        ctypes.c_int64(k),
        int(wide),
    )
    want = w.astype(np.float64) @ x.astype(np.float64)
    want += bias.astype(np.float64) if with_bias else 0
    scale = np.sqrt(k)
    rounding = {"float16": 1e-3, "bfloat16": 8e-3}[dtype] if not wide else 1e-5
    assert np.abs(out.astype(np.float64) - want).max() < rounding * 4 * scale
