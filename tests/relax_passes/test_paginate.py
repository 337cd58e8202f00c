"""Compiled functions over a paged KV cache give the logits of the full forward in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from checkpoints import FAMILIES, SIZES, make_model
from transformers import AutoConfig, AutoModelForCausalLM
from tvm.relax.frontend.torch import from_exported_program

from relax_passes.importer import SUPPORTED_FAMILIES, ImportedCausalLM, import_causal_lm
from relax_passes.paginate import PaginateAttention
from relax_passes.pipeline import compile_causal_lm

MAX_SEQ_LEN = 64
CASES = [("ours", family) for family in FAMILIES] + [("tir", "llama")]


def full_forward(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids[None].astype("int64"))).logits[0].float().numpy()


def make(family: str) -> Any:
    window = {"sliding_window": MAX_SEQ_LEN} if family == "mistral" else {}
    return make_model(family, num_hidden_layers=2, **window)


def check(run: Any, expected: np.ndarray, ids: np.ndarray, *, tolerance: float) -> None:
    """A whole prefill; chunks, then decode; a ragged batch, then batched decode."""

    def close(logits: np.ndarray, position: int) -> None:
        error = np.abs(logits.reshape(-1) - expected[position]).max()
        assert error <= tolerance * np.abs(expected).max(), f"position {position}: {error}"

    last = len(ids) - 1
    run.start(0, 1)
    close(run.run("prefill", [0], [len(ids)], ids[None]), last)
    close(run.run("prefill", [1], [7], ids[None, :7]), 6)
    close(run.run("prefill", [1], [9], ids[None, 7:16]), 15)
    for position in range(16, len(ids)):
        close(run.run("decode", [1], [1], ids[None, position : position + 1]), position)

    lengths = np.array([5, 11, 2])
    run.start(0, 1, 2)
    ragged = np.concatenate([ids[:n] for n in lengths])[None]
    logits = run.run("batch_prefill", [0, 1, 2], lengths, ragged, np.cumsum(lengths) - 1)
    assert logits.shape == (1, 3, expected.shape[1])
    for row, n in enumerate(lengths):
        close(logits[0, row], n - 1)
    for step in range(4):
        column = ids[lengths + step][:, None]
        logits = run.run("batch_decode", [0, 1, 2], [1, 1, 1], column)
        assert logits.shape == (3, 1, expected.shape[1])
        for row, n in enumerate(lengths):
            close(logits[row], n + step)


def make_other(family: str, layers: int) -> Any:
    """A tiny model of a family that tests/checkpoints.py does not know."""
    sizes = {**SIZES, "num_hidden_layers": layers, "max_position_embeddings": MAX_SEQ_LEN}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            mean, spread = (1.0, 0.2) if parameter.ndim == 1 else (0.0, 0.15)
            parameter.normal_(mean, spread)
    return model


def compile_small(imported: ImportedCausalLM, attention: str) -> Any:
    return compile_causal_lm(
        imported, attention=attention, max_batch=4, max_seq_len=MAX_SEQ_LEN, prefill_chunk_size=32
    )


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


@pytest.mark.parametrize("family", ["phi3", "gemma"])
def test_logits_of_other_families(
    family: str, driver: Callable[[Any], Any], tokens: np.ndarray
) -> None:
    """Stacked q, k, v in the checkpoint; scaled embeddings and tied weights."""
    model = make_other(family, 2)
    compiled = compile_small(import_causal_lm(model), "ours")
    check(driver(compiled), full_forward(model, tokens), tokens, tolerance=1e-5)


OTHER_FAMILIES = sorted(set(SUPPORTED_FAMILIES) - {*FAMILIES, "phi3", "gemma"})


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_are_paginated(family: str) -> None:
    imported = import_causal_lm(make_other(family, 1))
    module = PaginateAttention("ours", kernel="kernel")(imported.module)
    assert module["decode"].script().count("tvm_flashinfer.kv_cache_attention") == 1


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
        PaginateAttention("ours", kernel="kernel")(module)
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
    assert compiled.report.sites[0].mask == "causal+padding"
    check(driver(compiled), full_forward(model, tokens), tokens, tolerance=2e-6)


@pytest.fixture(scope="module")
def paginated() -> tvm.IRModule:
    imported = import_causal_lm(make("llama"))
    return PaginateAttention("ours", kernel="kernel")(imported.module)


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
