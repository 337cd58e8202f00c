"""Suite ``mlc``: a random Llama compiled by MLC-LLM, over our KV cache and over TVM's.

All else is the same in both, our linear layers included. Steps are driven as MLC's engine drives
them, by the compiled functions; where mlc_llm's C++ library is, the engine's own report of a token
is measured too.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.runtime.vm import VirtualMachine

from .generate import Shape, attention_seconds, make_checkpoint
from .machine import read_bandwidth
from .report import Row
from .suites import Context

__all__ = ["LLAMA", "Subject", "run"]

SUITE = "mlc"
_PROCESS = "tvm_flashinfer.bench.mlc_process"
PEER = "tvm-cache"
MODEL = ("--model-type", "llama", "--quantization", "q0f32")
LLAMA = Shape(
    layers=2, hidden=2048, heads=32, kv_heads=8, intermediate=2816, vocab=1024, context=2048
)
CHUNK = 512
#: Seconds for one of mlc_llm's commands.
LIMIT = 900
#: What the engine is asked for: prompts of so many tokens, up to a context of 2048; how many tokens
#: more, and how often.
PROMPTS, TOKENS, REQUESTS = (5, 1980), 64, 5


def run(context: Context, shape: Shape = LLAMA) -> None:
    """Adds the rows of this suite to ``context.report``."""
    steps, engine = f"{shape.name}, context {shape.context}", f"{shape.name} by MLCEngine"
    if context.device != "cpu":
        context.report.skipped[SUITE] = f"it measures the cpu, not {context.device}"
        return
    if not context.wants(steps) and not context.wants(engine):
        return
    if not context.has_packages(SUITE, "torch", "transformers"):
        return
    context.report.machine["model"] = dataclasses.asdict(shape)
    checkpoint = context.folder / "checkpoint"
    try:
        libraries = _compile(context, shape, checkpoint)
    except _MLCError as error:
        context.report.skipped[SUITE] = str(error)
        return
    if context.wants(steps):
        _step_rows(context, shape, libraries, steps)
    if context.wants(engine):
        try:
            model = context.folder / "model"
            _convert(context, shape, checkpoint, model)
            _engine_rows(context, model, libraries, engine)
        except _MLCError as error:
            context.report.skipped[engine] = str(error)


class _MLCError(Exception):
    """mlc_llm isn't there, or failed: the last line that it wrote."""


def _mlc(module: str, *arguments: object) -> str:
    """What ``python -m module arguments`` writes."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:  # the engine waits for threads of its own that failed
        raise _MLCError(f"{' '.join(command[1:5])} hasn't ended in {LIMIT} s") from None
    if done.returncode:
        raise _MLCError((done.stderr.strip() or "it ended without a word").splitlines()[-1])
    return done.stdout


def _compile(context: Context, shape: Shape, checkpoint: Path) -> dict[str, Path]:
    """The libraries by cache."""
    _mlc("tvm_flashinfer", "mlc", "--help")  # is it there?
    context.progress("make a random checkpoint")
    make_checkpoint(shape, checkpoint)
    overrides = ";".join(f"{name}={value}" for name, value in _sizes(shape).items())
    libraries = {}
    for cache in ("ours", "tvm"):
        context.progress(f"compile it over {'our' if cache == 'ours' else 'TVM'} cache")
        libraries[cache] = context.folder / f"{cache}.so"
        arguments = [checkpoint / "config.json", *MODEL, "--overrides", overrides]
        arguments += ["--device", "llvm", "-o", libraries[cache]]
        _mlc(_PROCESS, "compile", cache, *arguments)
    return libraries


def _sizes(shape: Shape) -> dict[str, int]:
    return {
        "context_window_size": 2 * shape.context,
        "prefill_chunk_size": CHUNK,
        "max_batch_size": 1,
    }


def _convert(context: Context, shape: Shape, checkpoint: Path, model: Path) -> None:
    """The folder that MLCEngine takes."""
    context.progress("convert weights")
    _write_tokenizer(shape, checkpoint)
    sizes = [
        text
        for name, value in _sizes(shape).items()
        for text in (f"--{name.replace('_', '-')}", value)
    ]
    made = [checkpoint, *MODEL, "-o", model]
    _mlc("tvm_flashinfer", "mlc", "gen_config", *made, "--conv-template", "LM", *sizes)
    _mlc("tvm_flashinfer", "mlc", "convert_weight", *made, "--device", "cpu")


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    """A word for each token: the engine must have one, and prompts are given as tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def _extents(param: dict[str, Any], shape: Shape) -> list[int]:
    """Of a weight in the model's metadata, which calls the size of the vocabulary by a name."""
    return [shape.vocab if isinstance(extent, str) else extent for extent in param["shape"]]


class Subject:
    """A compiled model with random weights, one sequence in its cache."""

    def __init__(self, library: Path, shape: Shape) -> None:
        module = tvm.runtime.load_module(str(library))
        self._device = tvm.cpu()
        self.vm = VirtualMachine(module, self._device)
        rng = np.random.default_rng(0)
        self._params = [
            self._put(0.02 * rng.standard_normal(_extents(param, shape), dtype=np.float32))
            for param in json.loads(self.vm["_metadata"]())["params"]
        ]
        # Sequences, tokens, tokens of a step and of a page, no window.
        sizes = (1, 2 * shape.context, CHUNK, 16, 0)
        create = self.vm["create_tir_paged_kv_cache"]  # ours too, among its names
        self._cache = create(*(tvm_ffi.Shape([size]) for size in sizes))
        self._call("add_sequence", 0)

    def _put(self, data: Any) -> Any:
        return tvm.runtime.tensor(data, self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        tvm.get_global_func(f"vm.builtin.kv_state_{name}")(self._cache, *arguments)

    def _step(self, function: str, tokens: list[int]) -> None:
        self._call("begin_forward", tvm_ffi.Shape([0]), tvm_ffi.Shape([len(tokens)]))
        embedded = self.vm["embed"](self._put(np.asarray(tokens, "int32")), self._params)
        rows = embedded._create_view((1, *embedded.shape))
        self.vm[function](rows, self._cache, self._params)
        self._call("end_forward")

    def prefill(self, tokens: int) -> None:
        for begin in range(0, tokens, CHUNK):
            self._step("prefill", list(range(min(CHUNK, tokens - begin))))

    def decode(self, steps: int) -> Iterator[float]:
        """Seconds of each of ``steps`` steps; the cache ends as long as it was."""
        for token in range(steps):
            start = time.perf_counter()
            self._step("decode", [token])
            yield time.perf_counter() - start
        self._call("popn", 0, steps)

    def attention_seconds(self, steps: int) -> Iterator[float]:
        """Seconds inside attention in each of ``steps`` instrumented steps."""
        return attention_seconds(self.vm, self.decode(steps))


def _step_rows(context: Context, shape: Shape, libraries: dict[str, Path], case: str) -> None:
    subjects = {}
    for cache, library in libraries.items():
        context.progress(f"fill a cache: {cache}")
        subjects[cache] = Subject(library, shape)
        subjects[cache].prefill(shape.context)
    context.progress("decode")
    bandwidth = 0.0
    times: dict[str, list[float]] = {cache: [] for cache in subjects}
    inside: dict[str, list[float]] = {cache: [] for cache in subjects}
    for _ in range(4):  # in turns, so that whatever else the machine does meets both
        bandwidth = max(bandwidth, read_bandwidth(context.threads))
        for cache, subject in subjects.items():
            times[cache] += list(subject.decode(12))[2:]
            inside[cache] += list(subject.attention_seconds(12))[2:]
    for metric, seconds, floor in (
        ("decoding step", times, shape.decode_bytes(shape.context)),
        ("attention in a step", inside, shape.kv_bytes(shape.context)),
    ):
        values = {cache: 1e3 * statistics.median(seconds[cache]) for cache in seconds}
        _add(context, case, metric, values, 1e3 * floor / bandwidth, len(seconds["ours"]))


def _engine_rows(context: Context, model: Path, libraries: dict[str, Path], case: str) -> None:
    found: dict[str, dict[str, float]] = {}
    for cache, library in libraries.items():
        context.progress(f"MLCEngine: {cache}")
        arguments = ["engine", model, library, REQUESTS, TOKENS, *PROMPTS]
        found[cache] = json.loads(_mlc(_PROCESS, *arguments).splitlines()[-1])
    short, long = map(str, PROMPTS)
    for metric, of in (
        (f"inter-token latency at {short}", lambda times: times[short]),
        (f"inter-token latency at {long}", lambda times: times[long]),
        ("the difference: attention", lambda times: times[long] - times[short]),
    ):
        values = {cache: of(times) for cache, times in found.items()}
        _add(context, case, metric, values, None, REQUESTS)


def _add(
    context: Context,
    case: str,
    metric: str,
    values: dict[str, float],
    floor: float | None,
    samples: int,
) -> None:
    row = Row(
        suite=SUITE,
        case=case,
        metric=metric,
        unit="ms",
        better="lower",
        ours=values["ours"],
        floor=floor,
        peers={PEER: values["tvm"]},
        samples=samples,
    )
    context.report.rows.append(row)
