"""TVM Disco: a cache in every worker, with its share of heads, or of layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from host_session import HostSession
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache as AnyPagedKVCache
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode

from tvm_flashinfer.nn import PagedKVCache

WORKERS = 2
LAYERS, QUERY_HEADS, KV_HEADS, DIM, WIDTH = 2, 4, 2, 32, 48

Array = np.ndarray[Any, Any]


class Model(nn.Module):
    """Attention layers, split by heads: each worker projects, attends and adds its share."""

    def __init__(self, shards: int, layer_partition: list[int]) -> None:
        self.shards, self.partition = shards, layer_partition
        self.query_heads, self.kv_heads = QUERY_HEADS // shards, KV_HEADS // shards
        self.kernels: list[Any] = []

    def forward(
        self, x: nn.Tensor, qkv: nn.Tensor, out: nn.Tensor, cache: AnyPagedKVCache
    ) -> nn.Tensor:
        tokens, heads = x.shape[1], self.query_heads + 2 * self.kv_heads
        for layer in range(LAYERS):
            take = nn.Tensor.from_const(np.array([layer], "int32"))
            weight = nn.op.squeeze(nn.op.take(qkv, take, axis=0), 0)
            rows = nn.op.reshape(nn.op.matmul(x, weight), (1, tokens, heads, DIM))
            attended = cache.attention_with_fused_qkv(layer, rows, self.query_heads, DIM**-0.5)
            attended = nn.op.reshape(attended, (1, tokens, self.query_heads * DIM))
            weight = nn.op.squeeze(nn.op.take(out, take, axis=0), 0)
            share = nn.op.matmul(attended, weight)
            x = x + (nn.op.ccl_allreduce(share, "sum") if self.shards > 1 else share)
        return x

    def create(self) -> AnyPagedKVCache:
        cache = PagedKVCache(
            attn_kind="mha",
            max_batch_size=4,
            max_total_seq_len=256,
            prefill_chunk_size=64,
            page_size=16,
            support_sliding_window=0,
            layer_partition=relax.ShapeExpr(self.partition),
            num_hidden_layers=LAYERS,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            qk_head_dim=DIM,
            v_head_dim=DIM,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NORMAL,
            rope_scale=1,
            rope_theta=10000,
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=DIM,
            enable_disaggregation=False,
            dtype="float32",
            target=tvm.target.Target("llvm"),
        )
        self.kernels = cache.extern_mods
        return cache


def library(folder: Path, shards: int, partition: list[int]) -> str:
    model = Model(shards, partition)
    heads = model.query_heads + 2 * model.kv_heads
    modes = {"param_mode": "none", "effect_mode": "none"}
    tensor = nn.spec.Tensor
    module, _ = model.export_tvm(
        spec={
            "forward": {
                "x": tensor([1, "n", WIDTH], "float32"),
                "qkv": tensor([LAYERS, WIDTH, heads * DIM], "float32"),
                "out": tensor([LAYERS, model.query_heads * DIM, WIDTH], "float32"),
                "cache": nn.spec.Object(object_type=AnyPagedKVCache),
                "$": modes,
            },
            "create": {"$": modes},
        }
    )
    path = folder / f"{shards}.so"
    tvm.compile(module.with_attr("external_mods", model.kernels), "llvm").export_library(str(path))
    return str(path)


@pytest.fixture(scope="module")
def weights() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    heads = QUERY_HEADS + 2 * KV_HEADS
    qkv = rng.standard_normal((LAYERS, WIDTH, heads, DIM)).astype("float32") * WIDTH**-0.5
    out = rng.standard_normal((LAYERS, QUERY_HEADS, DIM, WIDTH)).astype("float32") * 0.1
    return qkv, out


def share(weights: tuple[Array, Array], worker: int, workers: int) -> tuple[Array, Array]:
    """A worker's heads: of queries, of keys and of values."""
    qkv, out = weights
    parts = np.split(qkv, [QUERY_HEADS, QUERY_HEADS + KV_HEADS], axis=2)
    mine = [np.split(part, workers, axis=2)[worker] for part in parts]
    heads = np.split(out, workers, axis=1)[worker]
    return (
        np.concatenate(mine, axis=2).reshape(LAYERS, WIDTH, -1),
        heads.reshape(LAYERS, -1, WIDTH),
    )


#: (sequences, tokens of each): a batch of prompts, a fork, steps over a page boundary, a rollback.
Step = tuple[dict[int, int], list[tuple[Any, ...]]]
STEPS: list[Step] = [
    ({0: 14, 1: 5}, [("add_sequence", 0), ("add_sequence", 1)]),
    ({2: 3, 0: 1}, [("fork_sequence", 0, 2, 9)]),
    ({0: 1, 1: 1, 2: 1}, []),
    ({0: 2, 1: 17}, [("popn", 0, 4)]),
    ({1: 1, 2: 1}, [("remove_sequence", 0)]),
]


def test_heads_of_two_workers_make_the_whole(tmp_path: Path, weights: tuple[Array, Array]) -> None:
    module = tvm.runtime.load_module(library(tmp_path, 1, [0, LAYERS]))
    vm = relax.VirtualMachine(module, tvm.cpu())
    alone = [tvm.runtime.tensor(part) for part in share(weights, 0, 1)]
    cache = vm["create"]()

    session = HostSession(WORKERS)
    workers = session.disco.load_vm_module(library(tmp_path, WORKERS, [0, LAYERS]), tvm.cpu())
    shares = [share(weights, worker, WORKERS) for worker in range(WORKERS)]
    sharded = [session.scatter(list(parts)) for parts in zip(*shares, strict=True)]
    caches = workers["create"]()

    rng = np.random.default_rng(1)
    for lengths, changes in STEPS:
        for name, *args in changes:
            tvm.get_global_func(f"vm.builtin.kv_state_{name}")(cache, *args)
            session.call(f"vm.builtin.kv_state_{name}", caches, *args)
        step = tvm_ffi.Shape(lengths), tvm_ffi.Shape(lengths.values())
        tvm.get_global_func("vm.builtin.kv_state_begin_forward")(cache, *step)
        session.call("vm.builtin.kv_state_begin_forward", caches, *step)
        x = rng.standard_normal((1, sum(lengths.values()), WIDTH)).astype("float32")
        expected = vm["forward"](tvm.runtime.tensor(x), *alone, cache).numpy()
        found = session.read(workers["forward"](session.same(x), *sharded, caches))
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
        tvm.get_global_func("vm.builtin.kv_state_end_forward")(cache)
        session.call("vm.builtin.kv_state_end_forward", caches)
    session.disco.shutdown()


def test_a_pipeline_stage_has_its_layers_only(tmp_path: Path) -> None:
    """One layer in each of two groups: what a worker's cache says of itself."""
    session = HostSession(WORKERS, groups=2)
    workers = session.disco.load_vm_module(library(tmp_path, 1, [0, 1, 2]), tvm.cpu())
    caches = workers["create"]()
    session.call("vm.builtin.kv_state_add_sequence", caches, 0)
    read = "vm.builtin.attention_kv_cache_get_checkpoint_metadata"
    found = [json.loads(text) for text in session.read(session.call(read, caches, 0))]
    assert [(cache["layer_begin"], cache["layer_end"]) for cache in found] == [(0, 1), (1, 2)]
    session.disco.shutdown()
