"""Form J: modules that make TVM's paged KV cache, or MLC's generic one, and attend through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from cache_arguments import cache_arguments
from tvm import relax
from tvm.ir import GenericConst, StringImm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache

from relax_passes.capture import PrepareCapture
from relax_passes.dispatch_kv_cache import (
    BOUNDS,
    MLC_CREATE,
    MLC_GENERIC,
    MLC_NAMES,
    STEP_CALLS,
    TVM_CREATE,
    DispatchError,
    DispatchKVCache,
)
from relax_passes.targets import resolve_target

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 32
WIDTH = HEADS + 2 * KV_HEADS
NO_PARAMETERS = {"param_mode": "none", "effect_mode": "none"}
#: Portions of two sequences: prefill, decode, append.
STEPS = ((9, 3), (1, 1), (1, 1), (4, 7))
#: Two sequences, 128 tokens, 64 in a step, pages of 16, no window.
SHAPES = [tvm_ffi.Shape([n]) for n in (2, 128, 64, 16, 0)]


class Model(nn.Module):
    """Attention layers one after another, and positions; its own function makes the cache."""

    def __init__(self, **changed: Any) -> None:
        self.changed = changed

    def forward(self, qkv: nn.Tensor, cache: PagedKVCache) -> tuple[nn.Tensor, nn.Tensor]:
        out = cache.attention_with_fused_qkv(0, qkv, HEADS, DIM**-0.5)
        rest = nn.op.split(qkv, [HEADS], axis=2)[1]
        out = cache.attention_with_fused_qkv(1, nn.op.concat([out, rest], 2), HEADS, DIM**-0.5)
        return out, cache.get_query_positions(qkv.shape[0] * qkv.shape[1])

    def decode(self, qkv: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        return self.forward(qkv, cache)[0]

    def create(self) -> PagedKVCache:
        arguments = cache_arguments((HEADS, KV_HEADS), DIM, LAYERS, **self.changed)
        return TIRPagedKVCache(**arguments)


def exported(**changed: Any) -> tvm.IRModule:
    qkv = nn.spec.Tensor([1, "n", WIDTH, DIM], "float32")
    cache = nn.spec.Object(object_type=PagedKVCache)
    step = {"cache": cache, "$": NO_PARAMETERS}
    one_token = nn.spec.Tensor(["b", 1, WIDTH, DIM], "float32")
    module, _ = Model(**changed).export_tvm(
        spec={
            "forward": {"qkv": qkv, **step},
            "decode": {"qkv": one_token, **step},
            "create": {"$": NO_PARAMETERS},
        }
    )
    return module


def dispatched(mod: tvm.IRModule) -> tvm.IRModule:
    return DispatchKVCache(resolve_target("native"))(mod)


def packed_calls(mod: tvm.IRModule, *functions: str) -> set[str]:
    """Names of the packed functions that Relax functions call."""
    names = set()

    def visit(e: Any) -> None:
        if isinstance(e, relax.ExternFunc):
            names.add(str(e.global_symbol))

    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function) and gvar.name_hint in (functions or [gvar.name_hint]):
            relax.analysis.post_order_visit(func.body, visit)
    return names


def state(name: str) -> Any:
    return tvm.get_global_func(f"vm.builtin.kv_state_{name}")


def states(
    mod: tvm.IRModule, create: Callable[[Any], Any] = lambda vm: vm["create"]()
) -> list[np.ndarray[Any, Any]]:
    """Attention and positions of each of STEPS."""
    vm = relax.VirtualMachine(tvm.compile(mod, resolve_target("native")), tvm.cpu())
    cache = create(vm)
    rng = np.random.default_rng(0)
    for sequence in range(2):
        state("add_sequence")(cache, sequence)
    found = []
    for lengths in STEPS:
        qkv = rng.standard_normal((1, sum(lengths), WIDTH, DIM), np.float32)
        state("begin_forward")(cache, tvm_ffi.Shape([0, 1]), tvm_ffi.Shape(lengths))
        found += [tensor.numpy() for tensor in vm["forward"](tvm.runtime.tensor(qkv), cache)]
        state("end_forward")(cache)
    return found


def test_the_same_module_over_either_cache() -> None:
    before = exported()
    after = dispatched(before)
    assert TVM_CREATE in packed_calls(before)
    assert not {n for n in packed_calls(after) if n.startswith("vm.builtin")}
    assert packed_calls(after, "forward") == {
        "tvm_flashinfer.kv_cache_attention_with_fused_qkv",
        "tvm_flashinfer.kv_cache_query_positions",
    }
    for ours, theirs in zip(states(after), states(before), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_windows_of_layers() -> None:
    """Against float64: TVM's own kernels for tokens without a past know no windows."""
    window = 5
    module = exported(
        attn_kind=["mha_sliding", "mha"],
        layer_sliding_window_size=window,
        rope_mode=RopeMode.NONE,
    )
    found = states(dispatched(module))
    rng = np.random.default_rng(0)
    kept: list[list[Any]] = [[np.zeros((0, WIDTH, DIM))] * 2 for _ in range(2)]
    for step, lengths in enumerate(STEPS):
        qkv = rng.standard_normal((sum(lengths), WIDTH, DIM), np.float32).astype(np.float64)
        at = 0
        for sequence, n in enumerate(lengths):
            x = qkv[at : at + n]
            for layer in range(LAYERS):
                past = kept[sequence]
                past[layer] = np.concatenate([past[layer], x])
                q, k, v = np.split(past[layer], [HEADS, HEADS + KV_HEADS], axis=1)
                k, v = (np.repeat(y, HEADS // KV_HEADS, axis=1) for y in (k, v))
                logits = np.einsum("qhd,khd->hqk", q[-n:], k) * DIM**-0.5
                total = len(k)
                seen = np.tri(n, total, total - n)
                if layer == 0:
                    seen -= np.tri(n, total, total - n - window)
                weights = np.where(seen, np.exp(logits), 0.0)
                out = np.einsum("hqk,khd->qhd", weights / weights.sum(2, keepdims=True), v)
                x = np.concatenate([out, qkv[at : at + n, HEADS:]], axis=1)
            np.testing.assert_allclose(found[2 * step][0, at : at + n], out, atol=1e-5)
            at += n


def test_a_step_can_be_captured_and_could_not_before() -> None:
    """What Relax's pass for CUDA graphs moves into the region that is captured."""

    def region(mod: tvm.IRModule) -> set[str]:
        bounds = {"tir_var_upper_bound": {"b": 2}, "num_input": 1}
        for gvar, func in mod.functions_items():
            if gvar.name_hint == "decode":
                mod.update_func(gvar, func.with_attrs(bounds))
        passes = [
            PrepareCapture(["decode"]),
            relax.transform.LegalizeOps(),
            relax.transform.RewriteDataflowReshape(),
            relax.transform.ToNonDataflow(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.RewriteCUDAGraph(),
        ]
        config = {"relax.backend.use_cuda_graph": True}
        with tvm.transform.PassContext(config=config):
            mod = tvm.transform.Sequential(passes)(mod)
        captured = [
            g.name_hint for g in mod.get_global_vars() if "cuda_graph_capture" in g.name_hint
        ]
        return packed_calls(mod, *captured) if captured else set()

    name = "attention_kv_cache_attention_with_fused_qkv"
    theirs = f"vm.builtin.{name}"
    assert theirs not in region(exported())
    assert STEP_CALLS[theirs] in region(dispatched(exported()))


# ---------------------------------------------------------------------------------------------
# MLC's generic creation

#: Latent attention: a row of the cache is a latent vector and a rotated part.
LATENT, ROTATED = 32, 16
OWN = LATENT + ROTATED
LATENT_CACHE = {
    "attn_kind": "mla",
    "num_key_value_heads": 1,
    "qk_head_dim": LATENT + ROTATED,
    "v_head_dim": LATENT,
    "mla_original_qk_head_dim": OWN,
    "mla_original_v_head_dim": LATENT,
    "rope_mode": RopeMode.NONE,
}


class GenericModel(Model):
    """As mlc_llm makes models: for its pipeline to say which cache it is."""

    def create_paged_kv_cache(
        self,
        max_batch_size: Any,
        max_total_seq_len: Any,
        prefill_chunk_size: Any,
        page_size: Any,
        support_sliding_window: Any,
    ) -> PagedKVCache:
        """The call that mlc_llm's ``PagedKVCache.create_generic`` makes."""
        sizes = {
            "attn_kind": "mha",
            "num_key_value_heads": KV_HEADS,
            "qk_head_dim": DIM,
            "v_head_dim": DIM,
            "mla_original_qk_head_dim": 0,
            "mla_original_v_head_dim": 0,
            "rope_mode": RopeMode.NORMAL,
        } | self.changed
        kind, *numbers = sizes.values()
        bounds = [max_batch_size, max_total_seq_len, prefill_chunk_size, page_size]
        call = relax.call_pure_packed(
            MLC_GENERIC,
            StringImm(kind),
            relax.ShapeExpr([*bounds, support_sliding_window]),
            relax.ShapeExpr([0, LAYERS]),
            *(relax.prim_value(int(n)) for n in (LAYERS, HEADS, *numbers, 1, 10000)),
            StringImm("{}"),
            *(relax.prim_value(n) for n in (0, sizes["qk_head_dim"], 0)),
            GenericConst(tvm.DataType("float32"), relax.AnyType()),
            ty_args=relax.AnyType(),
        )
        return PagedKVCache(_expr=call, _name="paged_kv_cache")

    def latent(
        self,
        q: nn.Tensor,
        k: nn.Tensor,
        v: nn.Tensor,
        q_latent: nn.Tensor,
        row: nn.Tensor,
        cache: PagedKVCache,
    ) -> nn.Tensor:
        """A prefill of latent attention: own tokens, the past, and both merged."""
        cache = cache.append_mla_kv(1, row)
        own = cache.self_attention(1, q, k, v, DIM**-0.5)
        past = cache.cross_attention(1, q_latent, LATENT, DIM**-0.5)
        return cache.merge_attn_output_inplace(*own, *past)[0]


def generic_module(function: str, tensors: dict[str, list[Any]], **changed: Any) -> tvm.IRModule:
    inputs = {name: nn.spec.Tensor(shape, "float32") for name, shape in tensors.items()}
    cache = nn.spec.Object(object_type=PagedKVCache)
    module, _ = GenericModel(**changed).export_tvm(
        spec={
            function: {**inputs, "cache": cache, "$": NO_PARAMETERS},
            MLC_CREATE: {**dict.fromkeys(BOUNDS, int), "$": NO_PARAMETERS},
        }
    )
    return module


def test_a_model_of_mlc_gives_what_tvms_cache_gives() -> None:
    module = dispatched(generic_module("forward", {"qkv": [1, "n", WIDTH, DIM]}))
    names = {g.name_hint for g in module.get_global_vars()}
    assert set(MLC_NAMES) <= names and MLC_CREATE not in names
    expected = states(exported())
    for name in MLC_NAMES:
        found = states(module, lambda vm, name=name: vm[name](*SHAPES))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_latent_attention_calls() -> None:
    """append_mla_kv, self and cross attention and their merging, against float64."""
    heads = [1, "n", HEADS]
    tensors = {
        "q": [*heads, OWN],
        "k": [*heads, OWN],
        "v": [*heads, LATENT],
        "q_latent": [*heads, LATENT + ROTATED],
        "row": [1, "n", 1, LATENT + ROTATED],
    }
    module = dispatched(generic_module("latent", tensors, **LATENT_CACHE))
    steps = ("append_mla_kv", "self_attention", "cross_attention", "merge_attn_output_inplace")
    assert packed_calls(module, "latent") == {f"tvm_flashinfer.kv_cache_{n}" for n in steps}
    vm = relax.VirtualMachine(tvm.compile(module, resolve_target("native")), tvm.cpu())
    cache = vm[MLC_NAMES[0]](*SHAPES)
    state("add_sequence")(cache, 0)
    rng = np.random.default_rng(0)
    past = np.zeros((0, LATENT + ROTATED))
    for n in (9, 5, 1):
        given = {
            name: rng.standard_normal([n if e == "n" else e for e in shape], np.float32)
            for name, shape in tensors.items()
        }
        state("begin_forward")(cache, tvm_ffi.Shape([0]), tvm_ffi.Shape([n]))
        found = vm["latent"](*map(tvm.runtime.tensor, given.values()), cache).numpy()
        state("end_forward")(cache)
        q, k, v, q_latent, row = (x[0].astype(np.float64) for x in given.values())
        own = np.einsum("qhd,khd->hqk", q, k)
        own[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        logits = np.concatenate([np.einsum("qhd,kd->hqk", q_latent, past), own], 2) * DIM**-0.5
        weights = np.exp(logits - logits.max(2, keepdims=True))
        weights /= weights.sum(2, keepdims=True)
        expected = np.einsum("hqk,kd->qhd", weights[..., : len(past)], past[:, :LATENT])
        expected += np.einsum("hqk,khd->qhd", weights[..., len(past) :], v)
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
        past = np.concatenate([past, row[:, 0]])


def test_a_module_that_makes_no_cache_is_left_alone() -> None:
    module = exported()
    del module[module.get_global_var("create")]
    assert dispatched(module).same_as(module)


def test_a_cache_that_ours_can_not_replace_is_an_error() -> None:
    module = generic_module(
        "forward", {"qkv": [1, "n", WIDTH, DIM]}, **LATENT_CACHE | {"rope_mode": RopeMode.NORMAL}
    )
    with pytest.raises(DispatchError, match="rope_mode must be NONE with attn_kind 'mla'"):
        dispatched(module)
