"""Suite ``linear``: ``tvm_flashinfer.linear`` beside numpy, PyTorch and TVM's own code.

The floor of a case is the larger of two times: reading the weight once at the machine's read
bandwidth, and the arithmetic at its matrix rate. A few rows (decoding) are bound by the first, many
(prefill) by the second. Weights take turns so that none is still in the cache when it comes again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from .machine import matmul_rate, read_bandwidth
from .report import Row
from .suites import Context
from .timing import Call, measure

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
SHAPES = ((512, 512), (512, 1376), (1376, 512), (512, 32000), (1024, 4096))
FEW_ROWS = (1, 2, 4, 8, 16, 32)
MANY_ROWS = (128, 512, 2048)
#: Bytes of weights that take turns: several times a large last-level cache.
ROTATION = 128 << 20


def run(context: Context) -> None:
    """Every case that is wanted, a row each."""
    bandwidth = read_bandwidth(context.threads)
    rate = matmul_rate()
    context.report.machine["read_bandwidth_gb_s"] = bandwidth / 1e9
    context.report.machine["matmul_gflop_s"] = rate / 1e9
    for dtype, rows, (k, n) in product(DTYPES, FEW_ROWS + MANY_ROWS, SHAPES):
        case = f"{dtype}-{rows}x{k}x{n}"
        if not context.wants(case):
            continue
        context.progress(f"linear {case}")
        seconds, samples = measure(_contenders(context, dtype, rows, k, n))
        medians = {name: 1e6 * value for name, value in seconds.items()}
        weight_bytes = k * n * np.dtype(DTYPES[dtype]).itemsize
        context.report.rows.append(
            Row(
                suite="linear",
                case=case,
                metric="time of a call",
                unit="us",
                better="lower",
                ours=medians.pop("ours"),
                floor=1e6 * max(weight_bytes / bandwidth, 2 * rows * k * n / rate),
                peers=medians,
                samples=samples,
            )
        )


def _contenders(context: Context, dtype: str, rows: int, k: int, n: int) -> dict[str, Call]:
    import tvm
    import tvm_ffi

    rng = np.random.default_rng(0)
    copies = max(2, ROTATION // (k * n * np.dtype(DTYPES[dtype]).itemsize))
    copies = copies if rows in FEW_ROWS else 2
    weights = rng.random((copies, n, k), np.float32).astype(DTYPES[dtype])
    x = rng.random((rows, k), np.float32).astype(DTYPES[dtype])

    ours = tvm_ffi.get_global_func("tvm_flashinfer.linear")
    tvm_x, tvm_out = tvm.runtime.tensor(x), tvm.runtime.tensor(np.empty((rows, n), DTYPES[dtype]))
    tvm_weights = [tvm.runtime.tensor(weight) for weight in weights]
    contenders: dict[str, Call] = {"ours": lambda i: ours(tvm_x, tvm_weights[i % copies], tvm_out)}

    if dtype == "float32":
        out = np.empty((rows, n), np.float32)
        contenders["numpy"] = lambda i: np.matmul(x, weights[i % copies].T, out=out)
    contenders |= dict(_torch(context, x, weights))
    contenders |= dict(_tvm_default(context, dtype, tvm_x, tvm_weights))
    return contenders


def _torch(context: Context, x: np.ndarray, weights: np.ndarray) -> Iterator[tuple[str, Call]]:
    """PyTorch's linear on as many threads."""
    if importlib.util.find_spec("torch") is None:
        context.report.skipped["torch"] = "not installed (pip install 'tvm-flashinfer[torch]')"
        return
    import torch

    torch.set_num_threads(context.threads)

    def view(array: np.ndarray) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch_x, torch_weights = view(x), view(weights)
    linear = torch.nn.functional.linear
    yield "torch", lambda i: linear(torch_x, torch_weights[i % len(weights)])


def _tvm_default(
    context: Context, dtype: str, x: Any, weights: list[Any]
) -> Iterator[tuple[str, Call]]:
    """What TVM's default CPU pipeline makes of the same matmul."""
    if dtype == "bfloat16":
        context.report.skipped["tvm (bfloat16)"] = "its default pipeline is measured in the others"
        return
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    arguments = [
        relax.Var(name, relax.TensorType(tuple(tensor.shape), dtype))
        for name, tensor in (("x", x), ("weight", weights[0]))
    ]
    with builder.function("main", arguments):
        with builder.dataflow():
            out = builder.emit_output(relax.op.linear(*arguments))
        builder.emit_func_output(out)
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    machine = relax.VirtualMachine(tvm.compile(builder.get(), target=target), tvm.cpu())
    main = machine["main"]
    yield "tvm", lambda i: main(x, weights[i % len(weights)])
