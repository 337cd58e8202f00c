"""Compiled functions over a paged KV cache give the logits of the full forward in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from checkpoints import FAMILIES, make_model
from stateful import MAX_SEQ_LEN, check, compile_small, full_forward
from transformers import DynamicCache
from tvm.relax.frontend.torch import from_exported_program

from relax_passes.frontend import from_torch
from relax_passes.importer import import_causal_lm
from relax_passes.paginate import PaginateAttention
from relax_passes.pipeline import compile_causal_lm
from tvm_flashinfer.jit import KernelArtifact

CASES = [("ours", family) for family in FAMILIES] + [("tir", "llama")]


def no_kernel(_spec: Any) -> KernelArtifact:
    """Names a kernel and compiles none."""
    return KernelArtifact("", "", "kernel")


def make(family: str) -> Any:
    window = {"sliding_window": MAX_SEQ_LEN} if family == "mistral" else {}
    return make_model(family, num_hidden_layers=2, **window)


@pytest.mark.parametrize(("attention", "family"), CASES, ids=lambda v: v)
def test_logits(
    attention: str, family: str, driver: Callable[[Any], Any], tokens: np.ndarray
) -> None:
    model = make(family)
    compiled = compile_small(import_causal_lm(model), attention)
    assert compiled.report.all_rewritten
    assert [(s.layer, s.mask.partition("+")[0]) for s in compiled.report.sites] == [
        (0, "causal"),
        (1, "causal"),
    ]
    check(driver(compiled), full_forward(model, tokens), tokens, tolerance=2e-6)


def test_bfloat16(driver: Callable[[Any], Any], tokens: np.ndarray) -> None:
    model = make("llama").to(torch.bfloat16)
    compiled = compile_small(import_causal_lm(model), "ours")
    assert compiled.dtype == "bfloat16"
    check(driver(compiled), full_forward(model, tokens), tokens, tolerance=3e-2)


def test_eager_graph_with_an_attention_mask_input(
    driver: Callable[[Any], Any], tokens: np.ndarray
) -> None:
    """A graph of the user's own: eager attention, TVM's default import, a mask as an input."""
    model = make("qwen3")
    model.set_attn_implementation("eager")

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            return out.logits

    length = torch.export.Dim("length", min=2)
    example = (torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))
    with torch.no_grad():
        program = torch.export.export(Whole(), example, dynamic_shapes=({1: length}, {1: length}))
    module = from_exported_program(
        program, keep_params_as_input=True, unwrap_unit_return_tuple=True
    )
    module["main"] = module["main"].without_attr("params")
    weights = {n: p.detach().numpy() for n, p in program.named_parameters()}

    with pytest.raises(Exception, match="attention_mask"):
        PaginateAttention(build=no_kernel)(module)
    imported = import_causal_lm(model)
    imported.module, imported.params = module, weights
    compiled = compile_causal_lm(
        imported,
        max_batch=4,
        max_seq_len=MAX_SEQ_LEN,
        prefill_chunk_size=32,
        all_ones_inputs=["attention_mask"],
    )
    assert [s.form for s in compiled.report.sites] == ["B", "B"]
    assert compiled.report.sites[0].mask == "causal"
    check(driver(compiled), full_forward(model, tokens), tokens, tolerance=2e-6)


def test_transformers_with_past_keys_and_values(
    driver: Callable[[Any], Any], tokens: np.ndarray
) -> None:
    """As transformers exports them: a DynamicCache of what is given, and what it has become."""
    model = make("llama")

    class WithPast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, *past: Any) -> Any:
            cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            out = self.model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            new = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
            return out.logits, *new

    config, auto = model.config, torch.export.Dim.AUTO
    shape = (1, config.num_key_value_heads, 6, config.head_dim)
    past = [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]
    example = (torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 10, dtype=torch.long), *past)
    shapes = ({1: auto}, {1: auto}, tuple({2: auto} for _ in past))
    with torch.no_grad():
        program = torch.export.export(WithPast().eval(), example, dynamic_shapes=shapes)
    imported = import_causal_lm(model)
    imported.module = from_torch(program, keep_params_as_input=True)
    imported.module["main"] = imported.module["main"].without_attr("params")
    imported.params = {n: p.detach().numpy() for n, p in program.named_parameters()}
    compiled = compile_causal_lm(
        imported,
        max_batch=4,
        max_seq_len=MAX_SEQ_LEN,
        prefill_chunk_size=32,
        all_ones_inputs=["mask"],
    )
    assert [s.mask for s in compiled.report.sites] == ["causal"] * 2
    check(driver(compiled), full_forward(model, tokens), tokens, tolerance=2e-6)


@pytest.fixture(scope="module")
def paginated() -> tvm.IRModule:
    imported = import_causal_lm(make("llama"))
    return PaginateAttention(build=no_kernel)(imported.module)


@pytest.mark.parametrize("name", ["prefill", "decode", "batch_prefill", "batch_decode"])
def test_nothing_of_the_full_attention_remains(paginated: tvm.IRModule, name: str) -> None:
    text = paginated[name].script()
    assert text.count("tvm_flashinfer.kv_cache_attention") == 2
    for gone in ("softmax", "arange", "less_equal", "broadcast_to", "index_tensor", "nn.attention"):
        assert gone not in text


def test_decode_needs_no_transpose(paginated: tvm.IRModule) -> None:
    text = paginated["decode"].script()
    # What is left transposes weights, which DispatchLinear takes.
    assert text.count("permute_dims") == text.count("matmul")


def test_only_wanted_logits_are_computed(paginated: tvm.IRModule) -> None:
    """After the last attention one row is computed, the MLP of the last layer included."""
    text = paginated["prefill"].script()
    after = text.rpartition("kv_cache_attention")[2]
    assert "R.Tensor((1, n," not in after.partition("strided_slice")[2].replace("lv", "")


def test_token_trees_are_verified(driver: Callable[[Any], Any], tokens: np.ndarray) -> None:
    """Every node of a tree gets the logits of its own path."""
    model = make("llama")
    run = driver(compile_small(import_causal_lm(model)))
    parents = [-1, 0, 0, 1, 2, 2]
    prefix, nodes = tokens[:9], tokens[9:15]
    run.start(0)
    run.run("prefill", [0], [len(prefix)], prefix[None])
    logits = run.run("batch_verify", [0], [len(nodes)], nodes[None], trees=parents)
    assert logits.shape[:2] == (1, len(nodes))
    for node in range(len(nodes)):
        path, at = [], node
        while at >= 0:
            path.insert(0, nodes[at])
            at = parents[at]
        expected = full_forward(model, np.concatenate([prefix, path]))[-1]
        error = np.abs(logits[0, node] - expected).max()
        assert error <= 2e-6 * np.abs(expected).max(), f"node {node}: {error}"
