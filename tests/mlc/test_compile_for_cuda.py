"""Models compiled for a GPU, on any machine with nvcc."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from models import config


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("cudagraph", [0, 1])
def test_llama_compiles_to_device_code(tmp_path: Path, cudagraph: int) -> None:
    from mlc_llm.cli import compile as mlc_compile

    (tmp_path / "config.json").write_text(json.dumps(config("llama") | {"head_dim": 64}))
    library = tmp_path / "model.so"
    arguments = [str(tmp_path / "config.json"), "--model-type", "llama", "-o", str(library)]
    arguments += ["--quantization", "q0f16", "--device", "nvidia/nvidia-h100"]
    mlc_compile.main([*arguments, "--opt", f"flashinfer=0;cublas_gemm=0;cudagraph={cudagraph}"])
    data = library.read_bytes()
    assert b"tvm_flashinfer.kv_cache_create" in data
    assert b"tvm_flashinfer.linear_cuda" in data
    assert b"sm_90a" in data and b'extern "C" __global__' not in data
    # The whole step is a graph, attention included: nothing of it is called by a name that Relax's
    # capture passes over.
    assert b"tvm_flashinfer.kv_cache_attention_with_fused_qkv" in data
    assert (b"tvm_flashinfer.graph_key" in data) == bool(cudagraph)
    assert (b"batch_decode_cuda_graph_capture" in data) == bool(cudagraph)
