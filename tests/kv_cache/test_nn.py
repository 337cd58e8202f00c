"""The cache in relax.frontend.nn: the same model over TVM's cache and over ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from cache_arguments import cache_arguments
from cache_model import to_tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache as AnyPagedKVCache
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache

from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.nn import PagedKVCache
from tvm_flashinfer.rope import RopeConfig

QUERY_HEADS, KV_HEADS, DIM = 4, 2, 32
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "gptj": {"rope_type": "gptj"},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "llama4": {
        "rope_type": "llama4",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}


def arguments(**changed: Any) -> dict[str, Any]:
    return cache_arguments((QUERY_HEADS, KV_HEADS), DIM, **changed)


class Model(nn.Module):
    """One attention layer, and the function that makes its cache."""

    def __init__(self, cache_class: type, scaling: dict[str, Any], **changed: Any) -> None:
        self.cache_class = cache_class
        self.changed = changed | {"rope_scaling": scaling}
        self.kernels: list[Any] = []

    def forward(self, qkv: nn.Tensor, cache: AnyPagedKVCache) -> nn.Tensor:
        return cache.attention_with_fused_qkv(0, qkv, QUERY_HEADS, DIM**-0.5)

    def create(self) -> AnyPagedKVCache:
        cache = self.cache_class(**arguments(**self.changed))
        self.kernels = cache.extern_mods
        return cache


def compiled(model: Model) -> Any:
    width = QUERY_HEADS + 2 * KV_HEADS
    no_parameters = {"param_mode": "none", "effect_mode": "none"}
    module, _ = model.export_tvm(
        spec={
            "forward": {
                "qkv": nn.spec.Tensor([1, "n", width, DIM], "float32"),
                "cache": nn.spec.Object(object_type=AnyPagedKVCache),
                "$": no_parameters,
            },
            "create": {"$": no_parameters},
        }
    )
    if model.kernels:
        module = module.with_attr("external_mods", model.kernels)
    return relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())


def outputs(cache_class: type, scaling: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    vm = compiled(Model(cache_class, scaling))
    width = QUERY_HEADS + 2 * KV_HEADS
    cache = vm["create"]()
    rng = np.random.default_rng(0)
    builtin = {
        name: tvm.get_global_func(f"vm.builtin.kv_state_{name}")
        for name in ("add_sequence", "begin_forward", "end_forward")
    }
    for seq_id in range(2):
        builtin["add_sequence"](cache, seq_id)
    found = []
    for lengths in ((33, 7), (1, 1), (1, 1), (5, 12)):
        qkv = rng.standard_normal((1, sum(lengths), width, DIM), np.float32)
        builtin["begin_forward"](cache, tvm_ffi.Shape([0, 1]), tvm_ffi.Shape(lengths))
        found.append(vm["forward"](to_tvm(qkv), cache).numpy())
        builtin["end_forward"](cache)
    return found


# TVM takes its time over its own kernels: by default one scaling that is ours, and one of TVM's.
@pytest.mark.parametrize(
    "scaling",
    [
        pytest.param(name, marks=() if name in ("llama3", "yarn") else pytest.mark.heavy)
        for name in SCALINGS
    ],
)
def test_a_model_gives_the_same_over_either_cache(scaling: str) -> None:
    expected = outputs(TIRPagedKVCache, SCALINGS[scaling])
    for ours, theirs in zip(outputs(PagedKVCache, SCALINGS[scaling]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_compiled_model_sends_its_pages_and_shows_keys_as_they_came() -> None:
    """Disaggregation and inline RoPE, from the compiled creation function on."""
    model = Model(PagedKVCache, {}, enable_disaggregation=True, rope_mode=RopeMode.INLINE)
    vm = compiled(model)
    cache = KVCache(vm["create"]())
    qkv = np.random.default_rng(0).standard_normal((1, 5, 8, DIM), np.float32)
    cache.add_sequence(0)
    sent: list[list[int]] = []
    tvm_ffi.register_global_func(
        "tvm_flashinfer.kv_transfer",
        lambda _layer, _pool, here, there, receiver: sent.append(there.numpy().tolist()),
        override=True,
    )
    try:
        cache.mark_send(0, 0, tvm_ffi.Shape([1, 40, 6]))
    finally:
        tvm_ffi.registry.remove_global_func("tvm_flashinfer.kv_transfer")
    with cache.step([0], [5]):
        vm["forward"](to_tvm(qkv), cache.handle)
    assert sent == [[40, 41, 42, 43, 44]]
    k, v = (tvm.runtime.empty((1, 5, KV_HEADS, DIM), "float32") for _ in range(2))
    cache.get_kv(0, 0, 5, k, v)
    _, keys, values = np.split(qkv, [QUERY_HEADS, QUERY_HEADS + KV_HEADS], axis=2)
    np.testing.assert_allclose(k.numpy(), keys, atol=1e-6)
    assert (v.numpy() == values).all()


def test_inline_yarn_shows_keys_as_they_came() -> None:
    """TVM's YaRN can't be undone: keys are stored as they come, and rotated by the kernel."""
    scaling = SCALINGS["yarn"]
    outputs_of = [compiled(Model(PagedKVCache, scaling, rope_mode=mode)) for mode in RopeMode]
    qkv = np.random.default_rng(0).standard_normal((1, 40, 8, DIM), np.float32)
    found = []
    for vm in outputs_of:
        cache = KVCache(vm["create"]())
        cache.add_sequence(0)
        for part in (qkv[:, :33], qkv[:, 33:34], qkv[:, 34:]):
            with cache.step([0], [part.shape[1]]):
                found.append(vm["forward"](to_tvm(part.copy()), cache.handle).numpy())
    none, normal, inline = found[:3], found[3:6], found[6:]
    for a, b, c in zip(none, normal, inline, strict=True):
        np.testing.assert_allclose(b, c, atol=2e-5)
        assert np.abs(a - b).max() > 0.1
    k, v = (tvm.runtime.empty((1, 40, KV_HEADS, DIM), "float32") for _ in range(2))
    cache.get_kv(0, 0, 40, k, v)
    assert (k.numpy() == qkv[:, :, QUERY_HEADS : QUERY_HEADS + KV_HEADS]).all()


def test_longrope_is_that_of_the_cache() -> None:
    """TVM's own function doesn't compile: compared with the cache that test_rope.py proves."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [1.0 + i / 4 for i in range(16)]}
    lengths = {"original_max_position_embeddings": 64, "max_position_embeddings": 256}
    scaling = {"rope_type": "longrope", **factors, **lengths}
    vm = compiled(Model(PagedKVCache, scaling))
    expected = KVCache.create(
        num_layers=1,
        num_qo_heads=QUERY_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        max_total_seq_len=128,
        page_size=16,
        rope=RopeConfig(scaling=scaling, context_length=256),
    )
    qkv = np.random.default_rng(0).standard_normal((1, 40, 8, DIM), np.float32)
    out = tvm.runtime.empty((40, QUERY_HEADS, DIM), "float32")
    cache = KVCache(vm["create"]())
    for each in (cache, expected):
        each.add_sequence(0)
        each.begin_forward([0], [40])
    expected.attention_fused_qkv(0, to_tvm(qkv[0]), out)
    found = vm["forward"](to_tvm(qkv), cache.handle)
    np.testing.assert_allclose(found.numpy().reshape(out.shape), out.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"attn_kind": ["mla", "mha"]}, "this cache serves 'mha' and 'mha_sliding', or 'mla'"),
        ({"attn_kind": "mla"}, "rope_mode must be NONE with attn_kind 'mla'"),
        ({"dtype": "int8"}, "q_dtype is 'int8'"),
    ],
)
def test_what_the_cache_does_not_serve(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PagedKVCache(**arguments(**changed))
