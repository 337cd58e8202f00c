"""Every quantisation of mlc_llm: what compiles and runs with our cache, and what says why not.

A new one, or one that starts to work, fails here: the table in docs/mlc.md is made of these lists.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked_attention import Checked
from engine_scripts import continuous_batch, logits
from models import calls, compile_model
from models import config as model_config
from test_compile_for_cuda import compile_for_cuda

#: By the dtype of keys and values: how far attention may be from float64's, as a share of the
#: largest output.
ATTENTION = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
#: By the same: how far two ways of rounding may be apart, as a share of the logits' deviation
#: (root mean square; another sequence's logits are 1.4 of it apart).
TOLERANCES = {"float32": 1e-4, "float16": 1.5e-2, "bfloat16": 1e-1}
#: Logits jump where the inputs of linear layers are rounded to eight bits: by as much as rounding
#: errs. With attention in float64, a last bit of float16 that is turned in one of a hundred outputs
#: moves e5m2's by 0.05, in one of two by 0.11.
JUMPS = {"float8_e5m2": 2**-3, "float8_e4m3fn": 2**-4}
ON_CPU = [
    "q0f16",
    "q0bf16",
    "q0f32",
    "q3f16_0",
    "q3f16_1",
    "q4f16_0",
    "q4f16_1",
    "q4f16_2",
    "q4bf16_0",
    "q4bf16_1",
    "q4f32_1",
    "q4f16_autoawq",
    "e5m2_e5m2_f16",
    "e4m3_e4m3_f16",
]
#: These compile, and say what they lack when they are run.
NOT_ON_CPU = {
    "q4f16_ft": "Cannot find .* fastertransformer.gemm_fp16_int",
    "e4m3_e4m3_f16_max_calibrate": "Cannot find .* mlc_llm.calibration_observer",
    "fp8_e4m3fn_bf16_block_scale": "Cannot find .* mlc.triton.w8a8_block_fp8_matmul",
    "fp8_e4m3fn_bf16_block_scale_static_activation": (
        "Cannot find .* mlc.triton.w8a8_block_fp8_matmul"
    ),
}
ON_CUDA = [
    *[name for name in ON_CPU if "f32" not in name],
    "q4f16_ft",
    "e4m3_e4m3_f16_max_calibrate",
]
_NO_FLOAT32 = "q_dtype is 'float32', CUDA kernels take float16 or bfloat16"
_NO_TRITON = "'int' object has no attribute 'value'"  # mlc_llm's call of Triton, under TVM 0.27
NOT_ON_CUDA = {
    "q0f32": _NO_FLOAT32,
    "q4f32_1": _NO_FLOAT32,
    "fp8_e4m3fn_bf16_block_scale": _NO_TRITON,
    "fp8_e4m3fn_bf16_block_scale_static_activation": _NO_TRITON,
}
#: Llama with every quantisation, the rest with what is used most.
FOR_CUDA = [("llama", name) for name in ON_CUDA] + [
    (family, name)
    for family in ("qwen3", "gemma3", "mistral", "deepseek_v2", "qwen3_moe", "qwen3_5")
    for name in ("q0f16", "q4f16_1")
]


def family_of(quantization: str) -> str:
    """Llama, where mlc_llm has it in that quantisation."""
    return "qwen3" if "block_scale" in quantization else "llama"


def sizes(quantization: str) -> dict[str, Any]:
    """Wide enough for the groups that weights are quantised in."""
    if "awq" in quantization:
        heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
        return {"hidden_size": 1024, "intermediate_size": 1024} | heads
    if "block_scale" in quantization:
        return {"hidden_size": 128, "intermediate_size": 256, "weight_block_size": (64, 64)}
    return {"hidden_size": 128, "intermediate_size": 256}


def compiled(quantization: str, cache: str = "ours") -> Path:
    overrides = tuple(sizes(quantization).items())
    return compile_model(family_of(quantization), quantization, cache, overrides)


def for_cuda(family: str, quantization: str, folder: Path) -> bytes:
    heads = {"qk_nope_head_dim": 48} if family == "deepseek_v2" else {"head_dim": 64}
    return compile_for_cuda(family, folder, quantization, **sizes(quantization) | heads)


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")


def test_every_quantisation_is_in_a_list() -> None:
    from mlc_llm.quantization import QUANTIZATION

    for works, fails in ((ON_CPU, NOT_ON_CPU), (ON_CUDA, NOT_ON_CUDA)):
        assert sorted([*works, *fails]) == sorted(QUANTIZATION)


@pytest.mark.parametrize(
    "quantization",
    [name if name == "q4f16_0" else pytest.param(name, marks=pytest.mark.heavy) for name in ON_CPU],
)
def test_on_a_cpu(quantization: str) -> None:
    """Attention is float64's to its dtype's rounding, and so the logits are TVM's."""
    from mlc_llm.quantization import QUANTIZATION

    scheme = QUANTIZATION[quantization]
    shapes = model_config(family_of(quantization)) | sizes(quantization)
    engine = Checked(compiled(quantization), shapes, ATTENTION[scheme.model_dtype])
    ours = logits(engine, continuous_batch)
    assert engine.calls == len(ours) * shapes["num_hidden_layers"]
    theirs = logits(compiled(quantization, "tvm"), continuous_batch)
    rounded = getattr(scheme, "activation_dtype", None)  # of what linear layers multiply
    tolerance = JUMPS.get(rounded, TOLERANCES[scheme.model_dtype])
    for mine, other in zip(ours, theirs, strict=True):
        assert np.isfinite(mine).all()
        apart = np.sqrt(np.mean((mine - other) ** 2, axis=-1)) / other.std(axis=-1)
        assert apart.max() < tolerance


@pytest.mark.heavy
@pytest.mark.parametrize("quantization", NOT_ON_CPU)
def test_not_on_a_cpu(quantization: str) -> None:
    with pytest.raises(Exception, match=NOT_ON_CPU[quantization]):
        logits(compiled(quantization), continuous_batch)


@pytest.mark.heavy
@needs_nvcc
@pytest.mark.parametrize(("family", "quantization"), FOR_CUDA)
def test_device_code(family: str, quantization: str, tmp_path: Path) -> None:
    library = for_cuda(family, quantization, tmp_path)
    kind = "mla" if family == "deepseek_v2" else "rope"
    assert calls(library, f"kv_cache_create_{kind}")
    if quantization.startswith("q0"):
        assert calls(library, "linear_cuda")


@needs_nvcc
@pytest.mark.parametrize("quantization", NOT_ON_CUDA)
def test_no_device_code(quantization: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=NOT_ON_CUDA[quantization]):
        for_cuda(family_of(quantization), quantization, tmp_path)
