"""Decoders of many families, stateful: each gives the logits of transformers' full forward.

A few run by default, chosen for what they have that the others don't; the rest is heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from stateful import check, compile_small, full_forward
from transformers import AutoConfig, AutoModelForCausalLM

from relax_passes.importer import SUPPORTED_FAMILIES, import_causal_lm

VOCAB, HEADS = 300, 4
_PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2, "head_dim": 16}
_WINDOW = {"sliding_window": 5, "query_pre_attn_scalar": 24}
_ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
#: family: (config, the variants of its two layers, their masks)
FAMILIES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "llama": (
        {
            **_GROUPED,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        ["softmax"] * 2,
        ["causal"] * 2,
    ),
    "mistral": ({**_GROUPED, "sliding_window": 5}, ["softmax"] * 2, ["causal+window(5)"] * 2),
    "qwen2": ({**_PLAIN, "num_key_value_heads": 2}, ["softmax"] * 2, ["causal"] * 2),
    "qwen3": (_GROUPED, ["softmax"] * 2, ["causal"] * 2),
    "gemma": (_GROUPED, ["softmax"] * 2, ["causal"] * 2),
    "gemma2": (
        {**_GROUPED, **_WINDOW},
        ["softmax+soft-cap(50)"] * 2,
        ["causal+window(5)", "causal"],
    ),
    "gemma3_text": (
        {**_GROUPED, **_WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        ["softmax"] * 2,
        ["causal+window(5)", "causal"],
    ),
    "phi3": ({**_PLAIN, "num_key_value_heads": 2}, ["softmax"] * 2, ["causal"] * 2),
    "phi": ({**_PLAIN, "partial_rotary_factor": 0.5}, ["softmax"] * 2, ["causal"] * 2),
    "gpt2": (
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": HEADS,
            "vocab_size": VOCAB,
            "n_positions": 64,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        ["softmax"] * 2,
        ["causal"] * 2,
    ),
    "gpt_neox": ({**_PLAIN, "rotary_pct": 0.5}, ["softmax"] * 2, ["causal"] * 2),
    "opt": (
        {**_PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64},
        ["softmax"] * 2,
        ["causal"] * 2,
    ),
    "bloom": (
        {"hidden_size": 64, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCAB},
        ["softmax+alibi"] * 2,
        ["causal"] * 2,
    ),
    "falcon": (
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "vocab_size": VOCAB,
            "multi_query": True,
            "new_decoder_architecture": False,
        },
        ["softmax"] * 2,
        ["causal"] * 2,
    ),
    "mixtral": (
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        ["softmax"] * 2,
        ["causal"] * 2,
    ),
    "qwen2_moe": (
        {**_GROUPED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
        ["softmax"] * 2,
        ["causal"] * 2,
    ),
    "qwen3_moe": ({**_GROUPED, **_EXPERTS, "num_experts": 4}, ["softmax"] * 2, ["causal"] * 2),
    "stablelm": ({**_PLAIN, "num_key_value_heads": 2}, ["softmax"] * 2, ["causal"] * 2),
    "smollm3": ({**_GROUPED, "no_rope_layers": [1, 0]}, ["softmax"] * 2, ["causal"] * 2),
    "cohere": (_GROUPED, ["softmax"] * 2, ["causal"] * 2),
    "cohere2": (
        {**_GROUPED, **_ALTERNATING},
        ["softmax"] * 2,
        ["causal+window(5)", "causal"],
    ),
    "olmo3": ({**_GROUPED, **_ALTERNATING}, ["softmax"] * 2, ["causal+window(5)", "causal"]),
    "gpt_oss": (
        {
            **_GROUPED,
            **_ALTERNATING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "truncate": False,
            },
        },
        ["softmax+learned-sink"] * 2,
        ["causal+window(5)", "causal"],
    ),
    "glm4": (_GROUPED, ["softmax"] * 2, ["causal"] * 2),
    "glm": (_GROUPED, ["softmax"] * 2, ["causal"] * 2),
    "olmo2": (_GROUPED, ["softmax"] * 2, ["causal"] * 2),
    "granite": ({**_GROUPED, "attention_multiplier": 0.3}, ["softmax"] * 2, ["causal"] * 2),
    "starcoder2": (
        {**_GROUPED, "sliding_window": None},
        ["softmax"] * 2,
        ["causal"] * 2,
    ),
}
#: What runs by default: soft-cap with windows, two rotations, ALiBi, partial rotation, experts.
DEFAULT = ("gemma2", "gemma3_text", "bloom", "gpt_neox", "qwen2_moe")


def make(family: str, **changed: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family][0] | changed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, spread = (1.0, 0.2) if parameter.ndim == 1 else (0.0, 0.15)
            parameter.normal_(mean, spread)
    return model.eval()


def test_every_supported_family_is_here() -> None:
    assert set(FAMILIES) == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize(
    "family",
    [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.heavy) for name in FAMILIES],
)
def test_logits(family: str, driver: Callable[[Any], Any], tokens: np.ndarray) -> None:
    model = make(family)
    compiled = compile_small(import_causal_lm(model))
    _, variants, masks = FAMILIES[family]
    assert compiled.report.all_rewritten
    assert [s.variant for s in compiled.report.sites] == variants
    assert [s.mask for s in compiled.report.sites] == masks
    check(driver(compiled), full_forward(model, tokens), tokens, tolerance=1e-5)


_SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 2.0},
}


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("llama", "yarn"),
        pytest.param("qwen3", "yarn", marks=pytest.mark.heavy),
        pytest.param("llama", "linear", marks=pytest.mark.heavy),
    ],
)
def test_scaled_rotations_are_the_caches(
    family: str, scaling: str, driver: Callable[[Any], Any], tokens: np.ndarray
) -> None:
    parameters = {"rope_type": scaling, "rope_theta": 10000.0, **_SCALINGS[scaling]}
    model = make(family, rope_parameters=parameters)
    compiled = compile_small(import_causal_lm(model))
    assert [s.rope for s in compiled.report.sites] == ["fused"] * 2
    check(driver(compiled), full_forward(model, tokens), tokens, tolerance=1e-5)
