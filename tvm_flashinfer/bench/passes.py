"""Suite ``passes``: whole graphs with their attention rewritten, beside TVM's default CPU pipeline.

Each model is exported by torch, imported by TVM, and compiled three times: by TVM's default
pipeline, by the same after InjectAttention, and by InjectAttention and our own lowering, which also
gives linear layers to a BLAS.  The floor is the time that PyTorch's matrix product would take for
as many FLOP.  The last case is a module of 32 layers, through which every pass of ours is timed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .report import Row
from .suites import Context, GraphPasses
from .timing import REST, Call, measure

__all__ = ["run"]

SUITE = "passes"
#: Where SDPA can't be had: transformers refuses it, or TVM's importer does.
EAGER = ("bloom", "gemma2", "gpt2", "mpt")
#: Models of which TVM's own importer makes something else.
MENDED = ("falcon",)
DEEP = "llama, 32 layers"
ENCODER = "minilm, 4x128 tokens"
DEFAULT, OURS, LINEAR = "tvm-default", "attention", "attention and linear layers"


def run(context: Context, size: Any = None) -> None:
    """Adds the rows of this suite to ``context.report``; ``size`` is a Size of zoo.py."""
    if context.device != "cpu":
        context.report.skipped[SUITE] = f"it measures the cpu, not {context.device}"
        return
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        context.report.skipped[SUITE] = "not installed: pip install 'tvm-flashinfer[torch]'"
        return
    import torch

    from .zoo import Size, ZooModel, architectures, example

    torch.set_num_threads(context.threads)
    passes = context.passes()
    size = size or Size(
        hidden=256,
        intermediate=512,
        vocab=256,
        positions=512,
        batch=1,
        length=256,
        window=64,
        frames=256,
        image=128,
    )
    for name in architectures(size):
        case = f"{name}, 1x{size.tokens(name)} tokens"
        if context.wants(case):
            attention = "eager" if name in EAGER else "sdpa"
            context.progress(case)
            model, args = ZooModel(name, attention, size), example(name, size)
            _add_rows(context, passes, case, model, args, mended=name in MENDED)
    if context.wants(ENCODER):
        _encoder(context, passes)
    if context.wants(DEEP):
        context.progress(DEEP)
        context.report.rows.extend(_pass_times(passes, Size(layers=32)))


def _encoder(context: Context, passes: GraphPasses) -> None:
    from . import sentence_encoder

    directory = sentence_encoder.find()
    if directory is None:
        context.report.skipped[ENCODER] = f"not installed: {sentence_encoder.INSTALL}"
        return
    context.progress(ENCODER)
    model = sentence_encoder.SentenceEncoder(directory)
    _add_rows(context, passes, ENCODER, model, sentence_encoder.encode_inputs(directory, 128))


def _import(model: Any, args: tuple[Any, ...]) -> Any:
    """The graph that TVM's importer makes."""
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    with torch.no_grad():
        program = torch.export.export(model, args)
    return from_exported_program(program, unwrap_unit_return_tuple=True)


def _compile(mod: Any, passes: GraphPasses, how: str) -> Callable[..., Any]:
    import tvm
    from tvm import relax

    if how != DEFAULT:
        mod = passes.inject()(mod)
    pipeline = passes.lower() if how == LINEAR else "default"
    executable = tvm.compile(mod, target=passes.target, relax_pipeline=pipeline)
    main: Callable[..., Any] = relax.VirtualMachine(executable, tvm.cpu())["main"]
    return main


def _add_rows(
    context: Context,
    passes: GraphPasses,
    case: str,
    model: Any,
    args: tuple[Any, ...],
    *,
    mended: bool = False,
) -> None:
    """Latency of a model, each way it is compiled, and of PyTorch."""
    import torch
    import tvm
    from torch.utils.flop_counter import FlopCounterMode

    mod = (passes.from_torch if mended else _import)(model, args)
    values = [tvm.runtime.tensor(np.asarray(a)) for a in args]
    contenders: dict[str, Call] = {}
    for how in (DEFAULT, OURS, LINEAR):
        contenders[how] = _caller(_compile(mod, passes, how), values)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        want = model(*args).numpy()
    for how in (OURS, LINEAR):
        off = np.abs(_numpy(contenders[how](0)) - want).max() / np.abs(want).max()
        if not off <= 1e-4:
            context.report.skipped[case] = f"{how}: {off:.1e} from PyTorch's result"
            return

    def torch_call(turn: int) -> Any:
        with torch.no_grad():
            return model(*args)

    contenders["torch"] = torch_call
    contenders["floor"] = _product()
    seconds, samples = measure(contenders, REST)
    floor = seconds.pop("floor") * counter.get_total_flops() / (2 * PRODUCT**3)
    peers = {name: 1e3 * seconds[name] for name in (DEFAULT, "torch")}
    for how in (OURS, LINEAR):
        context.report.rows.append(
            Row(
                suite=SUITE,
                case=case,
                metric=f"latency, our {how}",
                unit="ms",
                better="lower",
                ours=1e3 * seconds[how],
                floor=1e3 * floor,
                peers=peers,
                samples=samples,
            )
        )


PRODUCT = 1024


def _product() -> Call:
    import torch

    a = torch.ones((PRODUCT, PRODUCT))
    return lambda turn: torch.matmul(a, a)


def _caller(main: Callable[..., Any], values: list[Any]) -> Call:
    return lambda turn: main(*values)


def _numpy(result: Any) -> Any:
    return (result if hasattr(result, "numpy") else result[0]).numpy()


# ---------------------------------------------------------------------------------------------
# how long passes take


def _pass_times(passes: GraphPasses, size: Any) -> Iterator[Row]:
    """Seconds of InjectAttention and of every pass of our lowering, kernels being compiled."""
    import tvm

    from .zoo import ZooModel, example

    @tvm.ir.instrument.pass_instrument
    class Clock:
        """The time each pass takes, those it runs itself not counted."""

        def __init__(self) -> None:
            self.seconds: dict[str, float] = {}
            self.stack: list[list[float]] = []

        def run_before_pass(self, mod: Any, info: Any) -> None:
            self.stack.append([time.perf_counter(), 0.0])

        def run_after_pass(self, mod: Any, info: Any) -> None:
            start, inner = self.stack.pop()
            whole = time.perf_counter() - start
            self.seconds[info.name] = self.seconds.get(info.name, 0.0) + whole - inner
            if self.stack:
                self.stack[-1][1] += whole

    mod = _import(ZooModel("llama", "sdpa", size), example("llama", size))
    passes.inject()(mod)
    timed = tvm.transform.Sequential([passes.inject(), passes.lower()])
    clock = Clock()
    start = time.perf_counter()
    with tvm.transform.PassContext(opt_level=3, instruments=[clock]), passes.target:
        timed(mod)
    whole = time.perf_counter() - start
    ours = ("InjectAttention", "DispatchLinear", "FuseRMSNorm", "FoldLayout", "ScheduleElementwise")
    for name in ours:
        if name in clock.seconds:
            yield Row(
                suite=SUITE,
                case=DEEP,
                metric=f"pass time, {name}",
                unit="s",
                better="lower",
                ours=clock.seconds[name],
                floor=None,
                peers={"the whole pipeline": whole},
                samples=1,
            )
