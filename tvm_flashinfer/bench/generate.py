"""Suite ``generate``: a whole random Llama, ours against TVM's own attention and CPU pipeline."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from ..engine.model import CompiledModel
from .machine import matmul_rate, read_bandwidth
from .report import Row
from .suites import Context

__all__ = ["Shape", "attention_seconds", "make_checkpoint", "run"]

SUITE = "generate"
PEER = "tvm-tir"
# Calls of the library in which attention is computed.
ATTENTION_CALLS = (
    "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
    "tvm_flashinfer.kv_cache_attention",
    "tvm_flashinfer.kv_cache_attention_bhsd",
    "tvm_flashinfer.kv_cache_attention_views",
    "tvm_flashinfer.kv_cache_attention_with_fused_qkv",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 2
    intermediate: int = 1376
    vocab: int = 32000
    context: int = 2048
    prefill: tuple[int, ...] = (128, 2048)
    # The peer computes about ten tokens a second where we compute a thousand.
    peer_prefill_limit: int = 128

    @property
    def name(self) -> str:
        parameters = self.read_parameters + self.vocab * self.hidden
        return f"llama-{parameters / 1e6:.0f}m-fp32"

    @property
    def read_parameters(self) -> int:
        """Parameters that a decode step reads: all but the embedding table, of which it's a row."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        return self.layers * (attention + mlp) + self.vocab * self.hidden

    def kv_bytes(self, tokens: int) -> int:
        return tokens * self.layers * 2 * self.kv_heads * (self.hidden // self.heads) * 4

    def decode_bytes(self, tokens: int) -> int:
        """Bytes that a step with ``tokens`` in the cache can't help reading."""
        return 4 * self.read_parameters + self.kv_bytes(tokens)

    def prefill_flops(self, tokens: int) -> float:
        """Of the linear layers, of causal attention, and of one row of logits."""
        body = self.read_parameters - self.vocab * self.hidden
        attention = self.layers * 2 * self.hidden * tokens * tokens
        return 2.0 * body * tokens + attention + 2 * self.vocab * self.hidden


def run(context: Context, shape: Shape | None = None) -> None:
    """Adds the rows of this suite to ``context.report``."""
    shape = shape or Shape()
    decode_case = f"{shape.name}, context {shape.context}"
    prefill_cases = {n: f"{shape.name}, prompt {n}" for n in shape.prefill}
    wanted = {n: case for n, case in prefill_cases.items() if context.wants(case)}
    if context.device != "cpu":
        context.report.skipped[SUITE] = f"it measures the cpu, not {context.device}"
        return
    if not wanted and not context.wants(decode_case):
        return
    if not context.has_packages(SUITE, "torch", "transformers"):
        return
    context.progress("make a random checkpoint")
    context.report.machine["model"] = dataclasses.asdict(shape)
    checkpoint = context.folder / "checkpoint"
    make_checkpoint(shape, checkpoint)
    models = {}
    for attention in ("ours", "tir"):
        context.progress(f"compile it, attention {attention}")
        directory = context.folder / attention
        context.compile(checkpoint, directory, attention, 2 * shape.context)
        models[attention] = Subject(directory, shape)
    for tokens, case in wanted.items():
        context.progress(f"prefill, {tokens} tokens")
        _prefill_row(context, shape, models, tokens, case)
    if context.wants(decode_case):
        context.progress(f"decode, context {shape.context}")
        _decode_rows(context, shape, models, decode_case)


class Subject:
    """A compiled model under measurement: one sequence, filled to a length and held there."""

    def __init__(self, directory: Path, shape: Shape) -> None:
        self.model = CompiledModel(directory, kv_tokens=2 * shape.context, max_batch=1)
        self._shape = shape
        self._rng = np.random.default_rng(0)

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt to its first logits."""
        self.model.clear()
        self.model.add(0)
        ids = self._rng.integers(0, self._shape.vocab, tokens).tolist()
        chunk = self.model.manifest.prefill_chunk_size
        start = time.perf_counter()
        for begin in range(0, tokens, chunk):
            self.model.prefill([0], [ids[begin : begin + chunk]], [0])
        return time.perf_counter() - start

    def fill(self, tokens: int) -> None:
        """Puts random keys and values of ``tokens`` tokens into the cache, without the model.

        They go through TVM's own attention call, layer by layer, as a model would send them.
        """
        self.model.clear()
        self.model.add(0)
        shape = self._shape
        head = shape.hidden // shape.heads
        attend = tvm.get_global_func(ATTENTION_CALLS[0])
        chunk = self.model.manifest.prefill_chunk_size
        for begin in range(0, tokens, chunk):
            count = min(chunk, tokens - begin)
            rows = (count, shape.heads + 2 * shape.kv_heads, head)
            qkv = self.model.tensor(self._rng.standard_normal(rows, dtype=np.float32))
            out = self.model.tensor(np.zeros((count, shape.heads, head), np.float32))
            self.model.begin_forward([0], [count])
            for layer in range(shape.layers):
                attend(self.model.cache, layer, head**-0.5, qkv, out)
            self.model.end_forward()

    def decode(self, steps: int) -> Iterator[float]:
        """Seconds of each of ``steps`` steps; the cache ends as long as it was."""
        for token in self._rng.integers(0, self._shape.vocab, steps).tolist():
            start = time.perf_counter()
            self.model.decode([0], [token])
            yield time.perf_counter() - start
        self.model.pop(0, steps)

    def attention_seconds(self, steps: int) -> Iterator[float]:
        """Seconds inside attention in each of ``steps`` instrumented steps."""
        return attention_seconds(self.model.vm, self.decode(steps))


def attention_seconds(vm: Any, steps: Iterator[float]) -> Iterator[float]:
    """Seconds inside attention in each of ``steps`` of a virtual machine."""
    clock = _AttentionClock()
    vm.set_instrument(tvm_ffi.convert(clock))
    try:
        for _ in steps:
            yield clock.take()
    finally:
        vm.set_instrument(None)


class _AttentionClock:
    """A VM instrument that times the attention calls."""

    def __init__(self) -> None:
        self._total = 0.0
        self._start = 0.0

    def __call__(self, _func: Any, symbol: str, before: bool, _ret: Any, *_args: Any) -> int:
        if symbol in ATTENTION_CALLS:
            now = time.perf_counter()
            if before:
                self._start = now
            else:
                self._total += now - self._start
        return 0  # NO_OP: run the call

    def take(self) -> float:
        total, self._total = self._total, 0.0
        return total


def _prefill_row(
    context: Context, shape: Shape, models: dict[str, Subject], tokens: int, case: str
) -> None:
    rate = matmul_rate()
    ours = []
    for _ in range(3):
        ours.append(models["ours"].prefill(tokens))
        rate = max(rate, matmul_rate())
    peers = {}
    if tokens <= shape.peer_prefill_limit:
        peers[PEER] = tokens / models["tir"].prefill(tokens)
    else:
        why = "its linear layers are unscheduled: a prompt this long would take it minutes"
        context.report.skipped[f"{PEER} at {case}"] = why
    context.report.rows.append(
        Row(
            suite=SUITE,
            case=case,
            metric="prefill",
            unit="tokens/s",
            better="higher",
            ours=tokens / statistics.median(ours),
            floor=tokens * rate / shape.prefill_flops(tokens),
            peers=peers,
            samples=len(ours),
        )
    )


def _decode_rows(context: Context, shape: Shape, models: dict[str, Subject], case: str) -> None:
    for subject in models.values():
        subject.fill(shape.context)
        list(subject.decode(2))
    steps: dict[str, list[float]] = {name: [] for name in models}
    inside: dict[str, list[float]] = {name: [] for name in models}
    bandwidth = 0.0
    # In turns, so that whatever else the machine does meets them all.
    for _ in range(3):
        bandwidth = max(bandwidth, read_bandwidth(context.threads))
        for name, subject in models.items():
            count = 16 if name == "ours" else 4
            steps[name] += subject.decode(count)
            inside[name] += subject.attention_seconds(count)
    step = {name: statistics.median(values) for name, values in steps.items()}
    attention = {name: statistics.median(values) for name, values in inside.items()}
    context.report.machine["read_bandwidth_gb_s"] = bandwidth / 1e9
    samples = len(steps["ours"])

    def add(metric: str, unit: str, values: dict[str, float], floor: float | None) -> None:
        row = Row(
            suite=SUITE,
            case=case,
            metric=metric,
            unit=unit,
            better="lower",
            ours=values["ours"],
            floor=floor,
            peers={PEER: values["tir"]},
            samples=samples,
        )
        context.report.rows.append(row)

    def milliseconds(values: dict[str, float]) -> dict[str, float]:
        return {name: value * 1e3 for name, value in values.items()}

    floor = shape.decode_bytes(shape.context) / bandwidth * 1e3
    add("inter-token latency", "ms", milliseconds(step), floor)
    kv_floor = shape.kv_bytes(shape.context) / bandwidth * 1e3
    add("attention in a step", "ms", milliseconds(attention), kv_floor)
    share = {name: 100 * attention[name] / step[name] for name in models}
    add("attention's share of a step", "%", share, None)


def make_checkpoint(shape: Shape, directory: Path) -> None:
    """Writes a Llama with random weights, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * shape.context,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
