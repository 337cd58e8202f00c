# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""A whole decoding step of a Llama-3.1-8B-shaped random model, as one CUDA graph.

Steps run back to back; the median over windows of ten. The floor is weights and KV over the read
bandwidth that the same process measures. Host time is that of begin_forward alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path

import torch
from harness.build import build_read_floor
from harness.runtime import Model, random_params
from modules import ARCH, FOLDER

CASES = [(1, 4096), (16, 4096), (64, 4096), (1, 1024), (64, 1024)]
PROFILED = {(1, 4096), (16, 4096), (64, 4096)}


def read_bandwidth(folder: Path) -> float:
    """Bytes a second of one launch that reads 4 GiB."""
    lib = ctypes.CDLL(str(build_read_floor(folder, ARCH)))
    data = torch.randint(-128, 127, (4 << 30,), dtype=torch.int8, device="cuda")
    sink = torch.zeros(16, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    best = float("inf")
    for blocks in (1, 2, 4, 8, 16):
        times = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            lib.read_floor(
                ctypes.c_void_p(data.data_ptr()),
                ctypes.c_int64(data.numel()),
                blocks * torch.cuda.get_device_properties(0).multi_processor_count,
                ctypes.c_void_p(sink.data_ptr()),
                ctypes.c_void_p(stream),
            )
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        best = min(best, statistics.median(times[1:]))
    return data.numel() / best


def grow(model: Model, batch: int, context: int) -> None:
    """Sequences of `context` tokens, whatever their pages hold: a clock sees only how many."""
    model.state("clear")
    chunk = model.about["prefill_chunk_size"]
    for sequence in range(batch):
        model.state("add_sequence", sequence)
        for begin in range(0, context, chunk):
            model.begin([sequence], [min(chunk, context - begin)])
            model.state("end_forward")


def decode(
    model: Model, batch: int, windows: int = 7, steps: int = 10, wait: bool = False
) -> tuple[float, float]:
    """Seconds a step, and seconds of host time in begin_forward.

    `wait`: for the device after every step, which TVM's own cache needs to stay correct.
    """
    name = "decode" if batch == 1 else "batch_decode"
    order, ones = list(range(batch)), [1] * batch
    ids = model.ffi.from_dlpack(
        torch.randint(0, 128256, (batch, 1), dtype=torch.int32, device="cuda")
    )
    run = model.vm[name]
    host = []

    def one() -> None:
        begin = time.perf_counter()
        model.begin(order, ones)
        host.append(time.perf_counter() - begin)
        run(ids, model.cache, model.params)
        model.state("end_forward")
        if wait:
            torch.cuda.synchronize()

    for _ in range(4):
        one()
    torch.cuda.synchronize()
    times = []
    for _ in range(windows):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            one()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / steps)
    return statistics.median(times), statistics.median(host[4:])


def profile(model: Model, batch: int) -> None:
    """Where a step's time goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as trace:
        decode(model, batch, windows=1, steps=3)
        torch.cuda.synchronize()
    rows = sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)
    for row in rows[:14]:
        per_step = row.self_device_time_total / 7
        print(f"    {per_step:9.1f} us/step {row.count / 7:6.1f}x  {row.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    bandwidth = read_bandwidth(FOLDER)
    torch.cuda.empty_cache()
    models = FOLDER / "models"
    about = json.loads((models / "llama8b.json").read_text())
    begin = time.perf_counter()
    params = random_params(about)
    torch.cuda.synchronize()
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s;", end=" ")
    print(f"weights made in {time.perf_counter() - begin:.1f} s")
    embedding = max(p.numel() * 2 for p in params if p.shape[0] == 128256)
    weight_bytes = sum(p.numel() * 2 for p in params) - embedding
    model = Model(models, "llama8b", params, max_total_tokens=64 * 4352)
    rows = []
    for batch, context in CASES:
        grow(model, batch, context)
        seconds, _ = decode(model, batch)
        _, host = decode(model, batch, windows=3, wait=True)  # else it waits for the device
        kv_bytes = batch * context * 2 * 32 * 8 * 128 * 2
        floor = (weight_bytes + kv_bytes) / bandwidth
        print(
            f"  {batch:3d} x {context}: {seconds * 1e3:7.3f} ms a step, floor {floor * 1e3:6.3f}, "
            f"{seconds / floor:5.2f} x; begin_forward {host * 1e6:5.0f} us"
        )
        rows.append(
            {
                "case": f"{batch}x{context}",
                "ms": seconds * 1e3,
                "floor_ms": floor * 1e3,
                "begin_forward_us": host * 1e6,
            }
        )
        if options.profile and (batch, context) in PROFILED:
            profile(model, batch)
    if (models / "llama8b_tir.so").is_file():
        del model.cache, model
        peer = Model(models, "llama8b_tir", params, max_total_tokens=64 * 4352)
        for row, (batch, context) in zip(rows, CASES, strict=True):
            grow(peer, batch, context)
            seconds, host = decode(peer, batch, windows=3, steps=4, wait=True)
            row["tir_ms"], row["tir_begin_forward_us"] = seconds * 1e3, host * 1e6
            print(
                f"  {row['case']:>8}, TVM's TIR attention and the same cuBLASLt layers: "
                f"{seconds * 1e3:7.3f} ms; ours {row['ms'] / seconds * 1e-3 - 1:+.0%}; "
                f"begin_forward {host * 1e6:5.0f} us, ours "
                f"{row['begin_forward_us'] / host * 1e-6:.2f} x"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
