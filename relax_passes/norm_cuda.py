"""The RMS norm kernel of FuseRMSNorm, for CUDA: a block of threads a row."""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir
from tvm.script import tirx as T

MAX_THREADS = 1024
#: Elements of an access: TVM's CUDA code has no float32 vectors of more.
VECTOR_LANES = 4


def kernel(width: int, x_dtype: str, dtype: str, epsilon: float, residual: bool) -> Any:
    """x [n, width] (and y to add), weight [width] -> (h [n, width],) out [n, width].

    Rows are summed in a fixed order, whatever the batch.
    """
    func = _add_rms_norm if residual else _rms_norm
    schedule = s_tir.Schedule(func(width, x_dtype, dtype, epsilon))
    names = ["add", "square", "norm"] if residual else ["square", "norm"]
    row, _ = schedule.get_loops(schedule.get_sblock(names[0]))
    for name in names[1:]:
        schedule.reverse_compute_at(schedule.get_sblock(name), row)
    schedule.bind(row, "blockIdx.x")
    lanes = math.gcd(width, VECTOR_LANES)
    threads = math.gcd(width // lanes, MAX_THREADS)
    for name in names:
        columns = schedule.get_loops(schedule.get_sblock(name))[-1]
        _, thread, vector = schedule.split(columns, [None, threads, lanes])
        schedule.bind(thread, "threadIdx.x")
        if name != "square":
            schedule.vectorize(vector)
    schedule.set_scope(schedule.get_sblock("square"), 0, "shared")
    return schedule.mod["main"]


def _rms_norm(width: int, x_dtype: str, dtype: str, epsilon: float) -> Any:
    @T.prim_func(private=True, s_tir=True)
    def rms_norm(x: T.handle, weight: T.handle, out: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, width), x_dtype)
        W = T.match_buffer(weight, (width,), dtype)
        Out = T.match_buffer(out, (n, width), dtype)
        total = T.sblock_alloc_buffer((n,), "float32")
        for i, k in T.grid(n, width):
            with T.sblock("square"):
                vi, vk = T.axis.remap("SR", [i, k])
                with T.init():
                    total[vi] = T.float32(0)
                total[vi] = total[vi] + T.cast(X[vi, vk], "float32") * T.cast(X[vi, vk], "float32")
        for i, k in T.grid(n, width):
            with T.sblock("norm"):
                vi, vk = T.axis.remap("SS", [i, k])
                Out[vi, vk] = W[vk] * T.cast(
                    T.cast(X[vi, vk], "float32")
                    * T.rsqrt(total[vi] / T.float32(width) + T.float32(epsilon)),
                    dtype,
                )

    return rms_norm


def _add_rms_norm(width: int, x_dtype: str, dtype: str, epsilon: float) -> Any:
    @T.prim_func(private=True, s_tir=True)
    def add_rms_norm(
        x: T.handle, y: T.handle, weight: T.handle, h: T.handle, out: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, width), x_dtype)
        Y = T.match_buffer(y, (n, width), x_dtype)
        W = T.match_buffer(weight, (width,), dtype)
        H = T.match_buffer(h, (n, width), x_dtype)
        Out = T.match_buffer(out, (n, width), dtype)
        total = T.sblock_alloc_buffer((n,), "float32")
        for i, k in T.grid(n, width):
            with T.sblock("add"):
                vi, vk = T.axis.remap("SS", [i, k])
                H[vi, vk] = X[vi, vk] + Y[vi, vk]
        for i, k in T.grid(n, width):
            with T.sblock("square"):
                vi, vk = T.axis.remap("SR", [i, k])
                with T.init():
                    total[vi] = T.float32(0)
                total[vi] = total[vi] + T.cast(H[vi, vk], "float32") * T.cast(H[vi, vk], "float32")
        for i, k in T.grid(n, width):
            with T.sblock("norm"):
                vi, vk = T.axis.remap("SS", [i, k])
                Out[vi, vk] = W[vk] * T.cast(
                    T.cast(H[vi, vk], "float32")
                    * T.rsqrt(total[vi] / T.float32(width) + T.float32(epsilon)),
                    dtype,
                )

    return add_rms_norm
