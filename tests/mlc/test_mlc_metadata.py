"""What the engine reads of a compiled model before it makes a cache, and what the model carries."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import tvm
from engine import Engine
from models import CONFIGS, compile_model, config
from tvm import relax

try:
    from mlc_llm.model.model_preset import MODEL_PRESETS
except ImportError:
    MODEL_PRESETS = {}

FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "deepseek_v2", "qwen3_moe"]
#: Of a GPU, where mlc_llm's pass serves every family; nothing is compiled for it here.
THEIRS = "nvidia/nvidia-h100"


#: Families that mlc_llm has a configuration of, in real width with few layers, and those above. It
#: doesn't list one of ours; another has no attention.
PRESETS = {preset["model_type"]: preset for preset in MODEL_PRESETS.values()}
EVERY_FAMILY = sorted((PRESETS.keys() | CONFIGS.keys()) - {"qwen2_5_vl", "rwkv5"})
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


@cache
def exported(family: str, target: str = "llvm") -> tvm.IRModule:
    """The model as mlc_llm hands it to its pipeline."""
    from mlc_llm.model import MODELS
    from mlc_llm.quantization import QUANTIZATION

    model = MODELS[family]
    quantization = QUANTIZATION["q0f16"]
    sizes = config(family) if family in CONFIGS else PRESETS[family] | _few_layers(PRESETS[family])
    with tvm.target.Target(target):
        made, _ = model.quantize[quantization.kind](model.config.from_dict(sizes), quantization)
        module, _, _ = made.export_tvm(spec=made.get_default_spec(), allow_extern=True)
    return module


def _few_layers(preset: dict[str, Any]) -> dict[str, int]:
    return {name: 2 for name in LAYERS if name in preset}


def functions(module: tvm.IRModule) -> set[str]:
    return {gvar.name_hint for gvar, _ in module.functions_items()}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("family", "target"),
    [(family, "llvm") for family in EVERY_FAMILY]
    # Tiny models' heads are too narrow for a GPU; test_quantizations.py compiles wider ones.
    + [(family, THEIRS) for family in EVERY_FAMILY if family not in CONFIGS],
)
def test_every_family_gets_our_cache(family: str, target: str) -> None:
    from relax_passes.dispatch_kv_cache import DispatchKVCache

    module = exported(family, target)
    metadata = {"sliding_window_size": (PRESETS | CONFIGS)[family].get("sliding_window", -1)}
    made = DispatchKVCache(tvm.target.Target(target), metadata)(module)
    if "create_paged_kv_cache" not in functions(module):
        assert family == "bert"
        return
    names = {name for name in functions(made) if name.endswith("paged_kv_cache")}
    assert names == {"create_tir_paged_kv_cache", "create_flashinfer_paged_kv_cache"}
    assert "vm.builtin.paged_attention_kv_cache_create" not in made.script()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_described_as_mlc_llm_describes_it(family: str) -> None:
    from mlc_llm.compiler_pass.dispatch_kv_cache_creation import DispatchKVCacheCreation

    from relax_passes.dispatch_kv_cache import DispatchKVCache

    described: list[dict[str, Any]] = []
    window = {"sliding_window_size": config(family).get("sliding_window", -1)}
    for make, target in ((DispatchKVCacheCreation, THEIRS), (None, "llvm")):
        metadata = dict(window)
        target = tvm.target.Target(target)
        if make is not None:
            make(target, False, metadata)(exported(family))
        else:
            DispatchKVCache(target, metadata)(exported(family))
        described.append(metadata["kv_cache"])
    assert described[0] == described[1]


@pytest.mark.parametrize("present", [0, 1])
def test_a_model_carries_its_kernels_once(present: int) -> None:
    """Beside what it carried already. Two names make the cache: they share kernels and loader."""
    from relax_passes.dispatch_kv_cache import DispatchKVCache

    module = exported("gemma3")
    others = [tvm.runtime.load_static_library(__file__, ["other"])] * present
    if others:
        module = module.with_attr("external_mods", others)
    metadata = {"sliding_window_size": config("gemma3")["sliding_window"]}
    carried = DispatchKVCache(tvm.target.Target("llvm"), metadata)(module).attrs["external_mods"]
    assert [mod.same_as(other) for mod, other in zip(carried, others, strict=False)] == [
        True
    ] * present
    ours = list(carried)[present:]
    assert len(ours) == len({mod.__hash__() for mod in ours})
    # A kernel for layers without a window, one for those with, and what loads the library.
    assert len(ours) == 3


def test_functions_need_what_they_are_said_to_need() -> None:
    """`memory_usage` is of what TVM plans: attention takes nothing else of it than its output."""
    ours, theirs = (
        Engine(compile_model("llama", cache=cache)).metadata for cache in ("ours", "tvm")
    )
    assert ours["memory_usage"].keys() - theirs["memory_usage"].keys() == {
        "create_flashinfer_paged_kv_cache"
    }
    for name, size in theirs["memory_usage"].items():
        assert 0 <= ours["memory_usage"][name] <= size, name
    for name in ("prefill", "batch_decode", "batch_verify"):
        assert ours["memory_usage"][name] > 0
    for metadata in (ours, theirs):
        del metadata["memory_usage"]
    assert ours == theirs


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_pool_is_as_large_as_the_engine_computes(family: str) -> None:
    """cpp/serve/config.cc: heads, dimensions and layers of the metadata make bytes a token."""
    import tvm_ffi

    sizes = {"batch": 4, "total": 640, "page": 16}
    engine = Engine(compile_model(family), **sizes)
    about = engine.metadata["kv_cache"]
    token = about["head_dim"] * about["num_key_value_heads"] * 2 * 4  # keys and values, float32
    pools: dict[int, Any] = {}
    tvm.get_global_func("tvm_flashinfer.kv_cache_use_transfer")(
        engine.cache, tvm_ffi.convert(lambda layer, pool, *_: pools.update({layer: pool.shape}))
    )
    engine.add(0)
    engine.call("kv_cache_disagg_mark_send", 0, 0, tvm_ffi.Shape([1, 0, 8]), 0)
    engine.prefill({0: [1]})
    assert len(pools) == about["num_hidden_layers"]
    for pages, *page in pools.values():
        rows = pages * sizes["page"]
        assert rows * token == pages * 4 * page[0] * page[1] * page[2] * page[3]
        # A page more for each sequence, which may end inside one, as TVM's cache has it.
        assert sizes["total"] <= rows <= sizes["total"] + sizes["page"] * sizes["batch"]


def test_metadata_is_one_json_object() -> None:
    """As ``mlc_llm``'s tools read it: without a cache, without importing anything of ours."""
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(compile_model("llama"))), tvm.cpu())
    metadata = json.loads(vm["_metadata"]())
    assert metadata["kv_state_kind"] == "kv_cache"
    assert metadata["kv_cache"] == {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
