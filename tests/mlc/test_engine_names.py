"""Every name that MLC's engine looks up: what it takes from TVM's runtime and from a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tvm
from engine import shape
from mlc_engine_calls import CACHE_CALLS, CREATIONS
from models import compile_model, config
from tvm import relax

#: Functions of a model that belong to what not every model is.
OTHER_MODELS = {
    "cuda_graph_alloc_init",  # CUDA
    "create_rnn_state",  # RWKV
    "embedding_prefill",  # encoders
    "extend",  # latent attention
    "batch_extend",
    "image_embed",
    "batch_get_logits",  # EAGLE and Medusa
    "fuse_embed_hidden_states",
    "gather_hidden_states",
    "scatter_hidden_states",
}


@pytest.fixture(scope="module")
def sources() -> str:
    """The engine's C++ sources, which lie beside the Python ones in a checkout."""
    from tvm_flashinfer.mlc import mlc_llm_folder

    folder = mlc_llm_folder().parent.parent / "cpp"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: mlc_llm is not a checkout")
    files: list[Path] = [*folder.rglob("*.cc"), *folder.rglob("*.h")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_the_engines_packed_functions_exist(sources: str) -> None:
    names = set(re.findall(r'"(vm\.builtin\.[\w.]+)"', sources))
    assert "vm.builtin.kv_state_begin_forward" in names
    missing = {name for name in names if tvm.get_global_func(name, allow_missing=True) is None}
    # A feature of TVM's CUDA runtime, which the engine uses on that device only.
    assert not {name for name in missing if "cuda" not in name}


def test_the_cache_has_a_method_for_each_call_of_the_engine(sources: str) -> None:
    """A new one must be added to the list, and to the tests that drive it."""
    calls = set(
        re.findall(r'"vm\.builtin\.((?:kv_state|kv_cache|attention_kv_cache)_\w+)"', sources)
    )
    assert calls == CACHE_CALLS


def test_a_model_has_the_functions_that_the_engine_asks_for(sources: str) -> None:
    names = set(re.findall(r'mod_get_func\("(\w+)"\)', sources))
    assert {name for name in names if name.endswith("paged_kv_cache")} == CREATIONS
    module = tvm.runtime.load_module(str(compile_model("llama")))
    vm = relax.VirtualMachine(module, tvm.cpu())
    absent = {name for name in names if not vm.module.implements_function(name)}
    assert absent <= OTHER_MODELS


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "deepseek_v2"])
def test_either_name_makes_our_cache(family: str) -> None:
    """Heads, a window of the sequence, windows of layers, latent attention."""
    module = tvm.runtime.load_module(str(compile_model(family)))
    vm = relax.VirtualMachine(module, tvm.cpu())
    slides = int(config(family).get("sliding_window", -1) != -1)
    for name in CREATIONS:
        cache = vm[name](*(shape(size) for size in (2, 64, 16, 16, slides)))
        tvm.get_global_func("vm.builtin.kv_state_add_sequence")(cache, 0)
        tvm.get_global_func("tvm_flashinfer.kv_cache_graph_key")(cache)  # refuses another's
