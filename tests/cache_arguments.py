"""Arguments of ``relax.frontend.nn``'s ``PagedKVCache`` classes, by their own names."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode


def cache_arguments(
    heads: tuple[int, int], dim: int, layers: int = 1, **changed: Any
) -> dict[str, Any]:
    """Of two sequences, 128 tokens, 64 in a step; ``heads`` are of queries and of keys."""
    return {
        "attn_kind": "mha",
        "max_batch_size": 2,
        "max_total_seq_len": 128,
        "prefill_chunk_size": 64,
        "page_size": 16,
        "support_sliding_window": 0,
        "layer_partition": relax.ShapeExpr([0, layers]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "qk_head_dim": dim,
        "v_head_dim": dim,
        "mla_original_qk_head_dim": 0,
        "mla_original_v_head_dim": 0,
        "rope_mode": RopeMode.NORMAL,
        "rope_scale": 1,
        "rope_theta": 10000,
        "rope_scaling": {},
        "rope_ext_factors": relax.prim_value(0),
        "rotary_dim": dim,
        "enable_disaggregation": False,
        "dtype": "float32",
        "target": tvm.target.Target("llvm"),
    } | changed
