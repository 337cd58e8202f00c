"""Models compiled for a GPU, on any machine with nvcc."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import calls, config

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path"),
]


def compile_for_cuda(
    family: str, folder: Path, quantization: str = "q0f16", cudagraph: int = 0, **sizes: Any
) -> bytes:
    """``mlc compile``; the library as it is on disk."""
    from mlc_llm.cli import compile as mlc_compile

    (folder / "config.json").write_text(json.dumps(config(family) | sizes))
    library = folder / "model.so"
    arguments = [str(folder / "config.json"), "--model-type", family, "-o", str(library)]
    arguments += ["--quantization", quantization, "--device", "nvidia/nvidia-h100"]
    mlc_compile.main([*arguments, "--opt", f"flashinfer=0;cublas_gemm=0;cudagraph={cudagraph}"])
    data = library.read_bytes()
    assert b"sm_90a" in data and b'extern "C" __global__' not in data
    return data


@pytest.mark.parametrize("cudagraph", [0, 1])
def test_llama_compiles_to_device_code(tmp_path: Path, cudagraph: int) -> None:
    data = compile_for_cuda("llama", tmp_path, cudagraph=cudagraph, head_dim=64)
    assert calls(data, "kv_cache_create_rope")
    assert calls(data, "linear_cuda")
    # The whole step is a graph, attention included: nothing of it is called by a name that Relax's
    # capture passes over.
    assert calls(data, "kv_cache_attention_with_fused_qkv")
    assert calls(data, "graph_key") == bool(cudagraph)
    assert (b"batch_decode_cuda_graph_capture" in data) == bool(cudagraph)


@pytest.mark.parametrize("family", ["bert", "llava"])
def test_attention_beside_the_cache(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An encoder's layers, and those of a vision tower but the last, which LLaVA doesn't read."""
    with caplog.at_level(logging.INFO, "tvm_flashinfer.mlc.attention"):
        data = compile_for_cuda(family, tmp_path)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Attention ")]
    assert len(lines) == 2 and all("a kernel of tvm_flashinfer" in line for line in lines)
    assert calls(data, "graph_attention") and b"sequence_prefill" not in data


def test_what_has_no_kernel_is_left_to_mlc_llm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = compile_for_cuda("bert", tmp_path, "q0f32")
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Attention ")]
    why = "q_dtype is 'float32', CUDA kernels take float16 or bfloat16"
    assert lines == [f"Attention is left to mlc_llm: {why}"] * 2
    assert not calls(data, "graph_attention") and b"sequence_prefill" in data
