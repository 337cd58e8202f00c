"""mlc_llm's tensor parallelism and pipeline stages: workers of a Disco session, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from engine import VOCABULARY, Array, Engine
from host_session import HostSession
from models import compile_model, config

WORKERS = 2


def shard(name: str, weight: Array, worker: int) -> Array:
    """A worker's part of a weight: as the model's own shard strategies have it."""
    sizes = config("llama")
    heads = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["num_key_value_heads"]
    if "qkv_proj" in name:
        segments = [count * sizes["head_dim"] for count in heads]
    elif "gate_up_proj" in name:
        segments = [sizes["intermediate_size"]] * 2
    elif "o_proj" in name or "down_proj" in name:
        return np.split(weight, WORKERS, axis=1)[worker]
    else:
        return weight
    parts = np.split(weight, np.cumsum(segments)[:-1], axis=0)
    return np.concatenate([np.split(part, WORKERS, axis=0)[worker] for part in parts])


class Workers:
    """The engine's calls, in every worker."""

    def __init__(self, alone: Engine, groups: int, **overrides: int) -> None:
        self.groups = groups
        self.session = HostSession(WORKERS, groups)
        path = compile_model("llama", overrides=tuple(overrides.items()))
        self.vm = self.session.disco.load_vm_module(str(path), tvm.cpu())
        names = [param["name"] for param in alone.metadata["params"]]
        weights = [param.numpy() for param in alone.params]
        split = shard if groups == 1 else lambda _name, weight, _worker: weight
        mine = [
            self.session.scatter([split(name, weight, worker) for worker in range(WORKERS)])
            for name, weight in zip(names, weights, strict=True)
        ]
        self.params = self.session.call("ffi.Array", *mine)
        sizes = (8, 1024, 64, 16, 0)
        bounds = [tvm_ffi.Shape([size]) for size in sizes]
        self.caches = self.vm["create_flashinfer_paged_kv_cache"](*bounds)

    def call(self, name: str, *args: Any) -> None:
        self.session.call(f"vm.builtin.{name}", self.caches, *args)

    def step(self, kind: str, seqs: dict[int, list[int]]) -> list[Array]:
        """[worker][sequences, vocabulary] of the workers that have logits: the last stage's."""
        lengths = [len(tokens) for tokens in seqs.values()]
        self.call("kv_state_begin_forward", tvm_ffi.Shape(seqs), tvm_ffi.Shape(lengths))
        ids = self.session.same(np.concatenate(list(seqs.values())).astype("int32"))
        embedded = self.vm["embed"](ids, self.params)
        batch, tokens = (len(seqs), 1) if kind == "decode" else (1, sum(lengths))
        extents = tvm_ffi.Shape([batch, tokens, config("llama")["hidden_size"]])
        hidden = self.session.call("vm.builtin.reshape", embedded, extents)
        if kind == "decode":
            result = self.vm["batch_decode"](hidden, self.caches, self.params)
        else:
            last = self.session.same(np.cumsum(lengths).astype("int32") - 1)
            result = self.vm["batch_prefill"](hidden, last, self.caches, self.params)
        found = self.session.read(self.session.call("ffi.ArrayGetItem", result, 0))
        self.call("kv_state_end_forward")
        last_stage = found[WORKERS - WORKERS // self.groups :]
        return [logits.reshape(len(seqs), VOCABULARY) for logits in last_stage]


@contextmanager
def workers(alone: Engine, groups: int, **overrides: int) -> Iterator[Workers]:
    made = Workers(alone, groups, **overrides)
    try:
        yield made
    finally:
        made.session.disco.shutdown()


def check_as_one(alone: Engine, many: Workers) -> None:
    """Prompts, a fork and steps."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, VOCABULARY, count)]

    for seq_id in range(2):
        alone.add(seq_id)
        many.call("kv_state_add_sequence", seq_id)
    prompts = {0: draw(23), 1: draw(6)}
    expected = alone.prefill(prompts)
    for found in many.step("prefill", prompts):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    alone.fork(0, 2, 15)
    many.call("kv_state_fork_sequence", 0, 2, 15)
    more = {2: draw(4), 1: draw(9)}
    expected = alone.prefill(more)
    for found in many.step("prefill", more):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    for _ in range(4):
        tokens = dict(enumerate(draw(3)))
        expected = alone.decode(tokens)
        for found in many.step("decode", {s: [t] for s, t in tokens.items()}):
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_tensor_parallel_is_as_one() -> None:
    alone = Engine(compile_model("llama"))
    with workers(alone, 1, tensor_parallel_shards=WORKERS) as many:
        check_as_one(alone, many)


def test_pipeline_stages_are_as_one() -> None:
    """Its boundary is a function of mlc_llm's own library."""
    if tvm.get_global_func("mlc.multi_gpu.DispatchFunctionByGroup", allow_missing=True) is None:
        pytest.skip("mlc_llm's C++ library (libmlc_llm_module.so) isn't there")
    alone = Engine(compile_model("llama"))
    with workers(alone, 2, pipeline_parallel_stages=2) as many:
        check_as_one(alone, many)
