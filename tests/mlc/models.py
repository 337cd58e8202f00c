"""Tiny random models, compiled by mlc_llm with our cache or with its own."""

from __future__ import annotations

import functools
import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine import VOCABULARY

_FOLDER = tempfile.TemporaryDirectory(prefix="mlc-")  # removed with the process
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "rope_theta": 10000.0,
    "context_window_size": 512,
    "prefill_chunk_size": 64,
    "max_batch_size": 8,
    "tensor_parallel_shards": 1,
}
#: Configurations by family, as checkpoints and mlc-chat-config.json have them.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "weight_block_size": None,
    },
    "mistral": {"sliding_window": 48, "context_window_size": -1, "attention_sink_size": 4},
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "num_hidden_layers": 6,  # of which the last has no window
        "hidden_activation": "gelu_pytorch_tanh",
        "is_text_model": True,
        "rms_norm_eps": 1e-6,
    },
    "deepseek_v2": {
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "first_k_dense_replace": 2,  # mlc_llm has its experts for GPUs only
        "moe_layer_freq": 1,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "attention_bias": False,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 24,
        "v_head_dim": 16,
        "rope_scaling": {
            "rope_type": "yarn",
            "inv_theta_log_scale": 1 / (2 * math.log(10000.0)),
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "qwen3_moe": {
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "qwen3_5": {
        "hidden_act": "silu",
        "num_hidden_layers": 4,
        "full_attention_interval": 2,  # the others are recurrent
        "partial_rotary_factor": 0.5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "dtype": "float32",
    },
    "qwen2_5_vl": {
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rope_parameters": {"mrope_section": [2, 3, 3]},
    },
    "bert": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
    "llava": {
        "image_token_index": 7,
        "text_config": _COMMON,
        "vision_config": {
            "hidden_size": 48,
            "image_size": 32,
            "intermediate_size": 80,
            "num_attention_heads": 3,
            "num_hidden_layers": 3,
            "patch_size": 8,
            "projection_dim": 32,
            "vocab_size": VOCABULARY,
            "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu",
        },
    },
}


def config(family: str) -> dict[str, Any]:
    return _COMMON | CONFIGS[family]


@contextmanager
def tvm_cache() -> Iterator[None]:
    """mlc_llm's own pass, TVM's cache.

    On a CPU that one fails in layers with a window of their own: they get none here, which is the
    same for sequences up to the window.
    """
    from mlc_llm.compiler_pass import dispatch_kv_cache_creation, pipeline
    from tvm.relax.frontend.nn.llm import kv_cache

    ours, theirs = pipeline.DispatchKVCacheCreation, kv_cache.TIRPagedKVCache

    def without_windows(**arguments: Any) -> Any:
        if isinstance(arguments["attn_kind"], list):
            arguments["attn_kind"] = "mha"
        return theirs(**arguments)

    pipeline.DispatchKVCacheCreation = dispatch_kv_cache_creation.DispatchKVCacheCreation
    kv_cache.TIRPagedKVCache = without_windows
    try:
        yield
    finally:
        pipeline.DispatchKVCacheCreation, kv_cache.TIRPagedKVCache = ours, theirs


@functools.cache
def compile_model(
    family: str,
    quantization: str = "q0f32",
    cache: str = "ours",
    overrides: tuple[tuple[str, Any], ...] = (),
) -> Path:
    """A tiny random model, compiled; `cache` is "ours" or "tvm"."""
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-{cache}-", dir=_FOLDER.name))
    (folder / "config.json").write_text(json.dumps(config(family) | dict(overrides)))
    library = folder / "model.so"
    arguments = [str(folder / "config.json"), "--model-type", family, "--device", "llvm"]
    arguments += ["--quantization", quantization, "-o", str(library)]
    compiled_by(cache, arguments)
    return library


def compiled_by(cache: str, arguments: list[str]) -> None:
    """``mlc_llm compile ARGUMENTS``; `cache` is "ours" or "tvm"."""
    from mlc_llm.cli import compile as mlc_compile

    if cache == "ours":
        mlc_compile.main(arguments)
    else:
        with tvm_cache():
            mlc_compile.main(arguments)


def calls(library: bytes, name: str) -> bool:
    """Whether a compiled model calls ``tvm_flashinfer.NAME``: every model carries the names of all
    such functions once, in what loads our library (autoload.py)."""
    return len(re.findall(rb"tvm_flashinfer\.%b(?!\w)" % name.encode(), library)) > 1
