# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Decode and prefill on a CUDA device: floor, ours, torch's and FlashInfer's kernels in one run.

python tests/gpu/bench_attention.py [--cases GLOB] [--json FILE] [--sweep]
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from harness.abi import PlanLibrary, PlanOptions
from harness.build import build_plan, build_read_floor
from harness.device import DeviceCase, Module, compare
from harness.layouts import paged
from harness.timing import microseconds
from modules import ARCH, FOLDER, build
from peers import DECODE, PREFILL, FlashInfer
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, DIM = 32, 8, 128
ROTATE_BYTES = 1_200_000_000  # more than any L2, so every launch reads device memory
REST = 0.4
SAME = 1e-2  # relative difference up to which a peer has done the same work (bf16 rounds to 4e-3)


@dataclass
class Measured:
    """A case that ran: microseconds of a launch, error on one request, and its operands."""

    time: float
    error: float
    case: DeviceCase
    pools: torch.Tensor  # [copies, pages, 2, Hkv, page_size, D]; case.o is of the first


@dataclass
class Shape:
    """A batch of the bench."""

    name: str
    qo_lens: list[int]
    kv_lens: list[int]
    page_size: int = 16

    @property
    def decode(self) -> bool:
        return max(self.qo_lens) == 1

    @property
    def kv_bytes(self) -> int:
        return sum(self.kv_lens) * KV_HEADS * DIM * 2 * 2

    @property
    def flops(self) -> float:
        pairs = sum(
            q * kv - q * (q - 1) / 2 for q, kv in zip(self.qo_lens, self.kv_lens, strict=True)
        )
        return 4.0 * pairs * HEADS * DIM

    def time(self, launches: list[Callable[[], object]]) -> float:
        """Microseconds of a launch: prefill in bursts of some 8 ms, each after a rest."""
        if self.decode:
            return microseconds(launches)
        repeats = max(2, min(20, int(8e-3 / (self.flops / 400e12))))
        return microseconds(launches * repeats, 7, REST)


def uniform(low: int, high: int, n: int) -> list[int]:
    return np.random.default_rng(0).integers(low, high + 1, n).tolist()


def zipf(n: int, longest: int, mean: int) -> list[int]:
    """Lengths falling as a power of the rank, with the given longest and mean."""
    low, high = 0.0, 8.0
    ranks = np.arange(1, n + 1)
    for _ in range(60):
        power = (low + high) / 2
        lens = longest * ranks**-power
        low, high = (power, high) if lens.mean() > mean else (low, power)
    return np.maximum(1, lens).astype(int).tolist()


SHAPES = [
    Shape("decode 1x4096", [1], [4096]),
    Shape("decode 16x4096", [1] * 16, [4096] * 16),
    Shape("decode 64x4096", [1] * 64, [4096] * 64),
    Shape("decode 256x4096", [1] * 256, [4096] * 256),
    Shape("decode 8x32768", [1] * 8, [32768] * 8),
    Shape("decode 64xU(512,8192)", [1] * 64, uniform(512, 8192, 64)),
    Shape("decode 64 Zipf", [1] * 64, zipf(64, 65536, 4096)),
    Shape("decode 64x4096 page 1", [1] * 64, [4096] * 64, 1),
    Shape("prefill 1x8192", [8192], [8192]),
    Shape("prefill 4x4096", [4096] * 4, [4096] * 4),
    Shape("prefill 16x1024", [1024] * 16, [1024] * 16),
    Shape("prefill 16xU(512,2048)", uniform(512, 2048, 16), uniform(512, 2048, 16)),
    Shape("append 8x(512 on 8192)", [512] * 8, [8704] * 8),
    Shape("prefill 4x4096 page 1", [4096] * 4, [4096] * 4, 1),
]


class Bench:
    """Modules and pools shared by the cases."""

    def __init__(self, library: Path | None = None) -> None:
        self.plans = PlanLibrary(str(build_plan(FOLDER)))
        self.module = Module(library.resolve() if library else build(["main"])["main"].library)
        self.floor = ctypes.CDLL(str(build_read_floor(FOLDER, ARCH)))
        self.sink = torch.zeros(16, dtype=torch.uint8, device="cuda")
        self.difference = 0.0  # the largest of a peer's result from ours
        self.skipped: dict[str, str] = {}
        self.flashinfer: FlashInfer | None = None
        try:
            self.flashinfer = FlashInfer()
        except ImportError as error:
            self.skipped["flashinfer"] = f"cannot be imported: {error}"
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    def read_floor(self, size: int) -> float:
        """Microseconds to read `size` bytes, by the fastest of a few grids."""
        copies = max(1, math.ceil(ROTATE_BYTES / size))
        data = torch.randint(-128, 127, (copies, size), dtype=torch.int8, device="cuda")
        pointers = [data[i].data_ptr() for i in range(copies)]

        def launch(pointer: int, blocks: int) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            error = self.floor.read_floor(
                ctypes.c_void_p(pointer),
                ctypes.c_int64(size),
                blocks,
                ctypes.c_void_p(self.sink.data_ptr()),
                ctypes.c_void_p(stream),
            )
            if error != 0:
                raise RuntimeError(f"the floor kernel failed with CUDA error {error}")

        times = []
        for blocks in (self.multiprocessors * n for n in (1, 2, 3, 4, 8, 16)):
            work = [lambda p=p, b=blocks: launch(p, b) for p in pointers]
            times.append(microseconds(work))
        return min(times)

    def attention(
        self, shape: Shape, options: PlanOptions, module: Module | None = None, check: bool = True
    ) -> Measured:
        """Launch our kernel over rotating pools, and check one request."""
        module = module or self.module
        batch, pages = paged(
            shape.qo_lens, shape.kv_lens, shape.page_size, np.random.default_rng(0)
        )
        copies = max(1, math.ceil(ROTATE_BYTES / shape.kv_bytes)) if shape.decode else 1
        if self._pool_key != (copies, pages, shape.page_size):
            self._pools = None
            self._pools = torch.empty(
                (copies, pages, 2, KV_HEADS, shape.page_size, DIM),
                dtype=torch.bfloat16,
                device="cuda",
            ).normal_()
            self._pool_key = (copies, pages, shape.page_size)
        pools = self._pools
        assert pools is not None
        case = DeviceCase(batch, pages, HEADS, KV_HEADS, DIM, pool=pools[0])
        case.plan(self.plans, options)
        step = pools.stride(0) * 2
        base_k, base_v = case.params.k, case.params.v

        def launch(copy: int) -> None:
            case.params.k, case.params.v = base_k + copy * step, base_v + copy * step
            module.run(case.params, options.tile_rows, options.num_workers)

        measured = shape.time([partial(launch, c) for c in range(copies)])
        if not check:
            return Measured(measured, 0.0, case, pools)
        launch(0)
        torch.cuda.synchronize()
        shortest = int(np.argmin(shape.kv_lens))
        return Measured(measured, compare(case, [shortest])[0], case, pools)

    def peer(self, shape: Shape, name: str, ours: Measured) -> float:
        """Microseconds of a launch of FlashInfer's kernel over the operands of ours."""
        assert self.flashinfer is not None
        kernel = self.flashinfer.kernel(name, ours.case)
        kernel.run(ours.pools[0])
        want = ours.case.o.float()
        difference = float((kernel.out.float() - want).norm() / want.norm())
        if not difference <= SAME:
            raise RuntimeError(f"its result differs from ours by {difference:.1e}")
        self.difference = max(self.difference, difference)
        return shape.time([partial(kernel.run, pool) for pool in ours.pools])

    def peers(self, shape: Shape, ours: Measured) -> dict[str, float]:
        """Microseconds by kernel of FlashInfer; what failed is in `skipped`."""
        times = {}
        if self.flashinfer is not None:
            for name in DECODE if shape.decode else PREFILL:
                try:
                    times[name] = self.peer(shape, name, ours)
                except Exception as error:  # a peer that cannot run a case is reported, no more
                    self.skipped[f"{shape.name}: {name}"] = f"{type(error).__name__}: {error}"
        return times

    def host_plan(self, shape: Shape, options: PlanOptions) -> dict[str, float]:
        """Microseconds of host time of a plan and its copy to the device, ours and the peer's."""
        batch, pages = paged(
            shape.qo_lens, shape.kv_lens, shape.page_size, np.random.default_rng(0)
        )
        plan = self.plans.plan(batch, HEADS, KV_HEADS, options, repeats=100)
        buffer = torch.from_numpy(plan.buffer).pin_memory()
        target = torch.empty_like(buffer, device="cuda")
        # As the cache calls it: torch's copy takes several times as long.
        copy = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).split('.')[0]}").cudaMemcpyAsync
        operands = (
            ctypes.c_void_p(target.data_ptr()),
            ctypes.c_void_p(buffer.data_ptr()),
            ctypes.c_size_t(buffer.nbytes),
            ctypes.c_int(1),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        copies = []
        for _ in range(100):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            status = copy(*operands)
            copies.append((time.perf_counter() - begin) * 1e6)
            if status != 0:
                raise RuntimeError(f"cudaMemcpyAsync returned {status}")
        result = {"ours": plan.host_time + median(copies), "of that the copy": median(copies)}
        if self.flashinfer is not None:
            case = DeviceCase(batch, pages, HEADS, KV_HEADS, DIM)
            for name in DECODE:
                kernel = self.flashinfer.kernel(name, case, fixed_buffers=True)
                result[name] = kernel.plan_microseconds()
        return result

    _pool_key: tuple[int, ...] = ()
    _pools: torch.Tensor | None = None

    def sdpa(self, shape: Shape, backend: SDPBackend) -> float | None:
        """Torch's dense causal attention, where the batch is rectangular."""
        n = shape.qo_lens[0]
        if shape.qo_lens != shape.kv_lens or len(set(shape.qo_lens)) != 1:
            return None
        b = len(shape.qo_lens)
        q = torch.randn((b, HEADS, n, DIM), dtype=torch.bfloat16, device="cuda")
        k, v = (
            torch.randn((b, KV_HEADS, n, DIM), dtype=torch.bfloat16, device="cuda")
            for _ in range(2)
        )

        def launch() -> None:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

        return shape.time([launch])


def default_options(bench: Bench, shape: Shape) -> PlanOptions:
    """The heuristic of a run: tile by mean query length, one worker per resident block."""
    mean = sum(shape.qo_lens) / len(shape.qo_lens) * HEADS / KV_HEADS
    tile_rows = next((r for r in (16, 64, 128) if r >= mean), 128)
    return PlanOptions(tile_rows=tile_rows, num_workers=bench.module.num_workers(tile_rows))


def sweep(bench: Bench, shape: Shape, options: PlanOptions) -> None:
    """Scheduler knobs, one at a time."""
    knobs = {
        "min_chunk": (32, 64, 128, 256),
        "item_overhead": (0, 32, 64, 128, 256),
        "num_workers": tuple(bench.multiprocessors * n // 2 for n in (2, 3, 4, 6, 8)),
    }
    for name, values in knobs.items():
        times = [
            bench.attention(shape, replace(options, **{name: value}), check=False).time
            for value in values
        ]
        line = ", ".join(f"{v}: {t:.1f}" for v, t in zip(values, times, strict=True))
        print(f"  {shape.name}: {name}: {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--module", type=Path, help="another build of the main module")
    parser.add_argument("--sweep", action="store_true", help="vary the scheduler's knobs")
    parser.add_argument("--tiles", action="store_true", help="prefill with every tile")
    arguments = parser.parse_args()
    bench = Bench(arguments.module)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        if not fnmatch.fnmatch(shape.name, arguments.cases):
            continue
        options = default_options(bench, shape)
        measured = bench.attention(shape, options)
        ours = measured.time
        row: dict[str, Any] = {"suite": "attention", "case": shape.name}
        row |= {"error": measured.error, "ours_us": ours}
        peers = bench.peers(shape, measured)
        del measured
        if shape.decode:
            bench._pools, bench._pool_key = None, ()
            row["floor_us"] = bench.read_floor(shape.kv_bytes)
            row["share"] = row["floor_us"] / ours
        else:
            row["tflops"] = shape.flops / ours * 1e-6
            if arguments.tiles:
                for tile in (64, 128):
                    o = replace(options, tile_rows=tile, num_workers=bench.module.num_workers(tile))
                    time = bench.attention(shape, o, check=False).time
                    row[f"tile_{tile}"] = shape.flops / time * 1e-6
            for name, backend in (
                ("cudnn", SDPBackend.CUDNN_ATTENTION),
                ("flash", SDPBackend.FLASH_ATTENTION),
            ):
                dense_time = bench.sdpa(shape, backend)
                if dense_time is not None:
                    row[name] = shape.flops / dense_time * 1e-6
        if peers:
            row["flashinfer_us"] = peers
            row["best_peer"] = min(peers, key=lambda name: peers[name])
            row["of_best_peer"] = peers[row["best_peer"]] / ours
        rows.append(row)
        print(
            json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}),
            flush=True,
        )
        if arguments.sweep and shape.decode:
            sweep(bench, shape, options)
    plan_shape = Shape("plan 256x4096", [1] * 256, [4096] * 256)
    plan_times = None
    if fnmatch.fnmatch(plan_shape.name, arguments.cases):
        plan_times = bench.host_plan(plan_shape, default_options(bench, plan_shape))
    if arguments.json is not None:
        report = {
            "machine": {"device": torch.cuda.get_device_name(0), "torch": torch.__version__},
            "flashinfer": bench.flashinfer.version if bench.flashinfer else None,
            "rows": rows,
            "plan_256x4096_host_us": plan_times,
            "largest_difference_of_a_peer": bench.difference,
            "skipped": bench.skipped,
        }
        arguments.json.write_text(json.dumps(report, indent=1))
    print(f"\n{'case':26} {'error':>8} {'ours':>10} {'floor':>8} {'share':>6}  peers")
    for row in rows:
        best = ""
        if "best_peer" in row:
            peers = {k: round(v, 1) for k, v in row["flashinfer_us"].items()}
            best = f"{row['of_best_peer']:.2f}x FlashInfer's {row['best_peer']}, of {peers} us"
        if "share" in row:
            print(
                f"{row['case']:26} {row['error']:8.1e} {row['ours_us']:8.1f}us "
                f"{row['floor_us']:8.1f} {row['share']:6.1%}  {best}"
            )
        else:
            dense = {
                k: round(row[k]) for k in ("cudnn", "flash", "tile_64", "tile_128") if k in row
            }
            print(
                f"{row['case']:26} {row['error']:8.1e} {row['tflops']:6.0f}TF/s {'':8} {'':6}  "
                f"{best} {dense}"
            )
    if plan_times is not None:
        plans = ", ".join(f"{name} {value:.1f}" for name, value in plan_times.items())
        print(f"host time of a plan, 256x4096, us: {plans}")
    if bench.flashinfer is not None:
        print(f"flashinfer {bench.flashinfer.version}: largest difference {bench.difference:.1e}")
    for what, reason in bench.skipped.items():
        print(f"skipped: {what}: {reason}")


if __name__ == "__main__":
    main()
