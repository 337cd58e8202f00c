"""Tiny random models, compiled by mlc_llm with our cache or with its own."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VOCABULARY = 128
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
}


def config(family: str) -> dict[str, Any]:
    return _COMMON | CONFIGS[family]


@contextmanager
def tvm_cache(window: int | None = None) -> Iterator[None]:
    """mlc_llm's own pass, TVM's cache; with `window` for its mha_sliding layers."""
    from mlc_llm.compiler_pass import dispatch_kv_cache_creation, pipeline
    from tvm.relax.frontend.nn.llm import kv_cache

    ours, theirs = pipeline.DispatchKVCacheCreation, kv_cache.TIRPagedKVCache
    pipeline.DispatchKVCacheCreation = dispatch_kv_cache_creation.DispatchKVCacheCreation
    if window is not None:
        kv_cache.TIRPagedKVCache = functools.partial(theirs, layer_sliding_window_size=window)
    try:
        yield
    finally:
        pipeline.DispatchKVCacheCreation, kv_cache.TIRPagedKVCache = ours, theirs


@functools.cache
def compile_model(family: str, quantization: str = "q0f32", cache: str = "ours") -> Path:
    """``mlc_llm compile``; `cache` is "ours" or "tvm"."""
    from mlc_llm.cli import compile as mlc_compile

    folder = Path(tempfile.mkdtemp(prefix=f"mlc-{family}-{cache}-"))
    (folder / "config.json").write_text(json.dumps(config(family)))
    library = folder / "model.so"
    arguments = [str(folder / "config.json"), "--model-type", family, "--device", "llvm"]
    arguments += ["--quantization", quantization, "-o", str(library)]
    if cache == "ours":
        mlc_compile.main(arguments)
    else:
        with tvm_cache(config(family).get("sliding_window")):
            mlc_compile.main(arguments)
    return library
