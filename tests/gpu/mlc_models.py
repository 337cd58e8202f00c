# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Compiles MLC-LLM's models for the GPU tests, with what their CPU builds compute; needs mlc_llm's
Python sources (docs/mlc.md), nvcc and TVM's compiler, and no GPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

import tvm_flashinfer  # noqa: F401  (finds the BLAS that CPU builds call)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mlc"))

import engine_scripts as scripts
import models  # of tests/mlc
from engine import VOCABULARY, random_weight

HEADS = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
#: DeepSeek-V2's own sizes of a head.
LATENT = {
    "hidden_size": 256,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
#: Name: family, quantisation, cudagraph, sizes, scripts.
DECODERS: dict[str, tuple[str, str, int, dict[str, Any], list[Any]]] = {
    "llama": ("llama", "q0f16", 1, HEADS, [*scripts.SCRIPTS, scripts.trees_verified]),
    "llama_eager": ("llama", "q0f16", 0, HEADS, []),
    "llama_4bit": ("llama", "q4f16_1", 1, HEADS, [scripts.continuous_batch]),
    "mistral": ("mistral", "q0f16", 1, HEADS, [scripts.windows_slide]),
    "gemma3": ("gemma3", "q0f16", 1, HEADS, [scripts.continuous_batch, scripts.chunked_prompts]),
    "deepseek_v2": ("deepseek_v2", "q0f16", 1, LATENT, [scripts.latent]),
    "qwen3_moe": ("qwen3_moe", "q0f16", 1, HEADS, [scripts.continuous_batch]),
}
#: Family: the function that is run.
ENCODERS = {"bert": "prefill", "llava": "image_embed"}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "num_hidden_layers": 32,
    "rope_theta": 500000.0,
    "context_window_size": 8192,
    "prefill_chunk_size": 2048,
    "max_batch_size": 64,
    "tensor_parallel_shards": 1,
}


def mlc_compile(
    config: dict[str, Any], family: str, quantization: str, library: Path, *options: str
) -> Path:
    """``tvm-flashinfer mlc compile``, in a process of its own."""
    file = library.with_suffix(".config.json")
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "tvm_flashinfer", "mlc", "compile", str(file)]
    command += ["--model-type", family, "--quantization", quantization, "-o", str(library)]
    subprocess.run([*command, *options], check=True)
    file.unlink()
    return library


def for_gpu(
    config: dict[str, Any], family: str, quantization: str, library: Path, cudagraph: int = 0
) -> Path:
    options = "--device", "nvidia/nvidia-h100", "--opt", f"cudagraph={cudagraph}"
    return mlc_compile(config, family, quantization, library, *options)


def build_decoders(folder: Path, scratch: Path) -> None:
    """The reference is the same quantisation's CPU build, driven by the same scripts."""
    for name, (family, quantization, cudagraph, sizes, wanted) in DECODERS.items():
        config = models.config(family) | sizes
        for_gpu(config, family, quantization, folder / f"{name}.so", cudagraph)
        if wanted:
            library = scratch / f"{name}.so"
            mlc_compile(config, family, quantization, library, "--device", "llvm")
            found = {script.__name__: scripts.logits(library, script) for script in wanted}
            steps = {f"{k}/{n}": step for k, rows in found.items() for n, step in enumerate(rows)}
            np.savez(folder / f"{name}.npz", **steps)


def build_encoders(folder: Path, scratch: Path) -> None:
    """The reference is the CPU build in float32, with weights that float16 holds exactly."""
    for family, function in ENCODERS.items():
        config = models.config(family)
        for_gpu(config, family, "q0f16", folder / f"{family}.so")
        library = mlc_compile(config, family, "q0f32", scratch / f"{family}.so", "--device", "llvm")
        vm = VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
        weights = [random_weight(param) for param in json.loads(vm["_metadata"]())["params"]]
        params = [tvm.runtime.tensor(w.astype("float16").astype("float32")) for w in weights]
        inputs = encoder_inputs(family)
        out = vm[function](*map(tvm.runtime.tensor, inputs), params).numpy()
        given = {f"in{n}": array for n, array in enumerate(inputs)}
        np.savez(folder / f"{family}.npz", out=out, **given)


def encoder_inputs(family: str) -> list[np.ndarray]:
    """An image; texts of three lengths and which of their tokens aren't padding."""
    rng = np.random.default_rng(0)
    if family == "llava":
        size = models.config(family)["vision_config"]["image_size"]
        return [rng.integers(0, 256, (1, size, size, 3), dtype="uint8")]
    ids = rng.integers(0, VOCABULARY, (3, 33)).astype("int32")
    return [ids, (np.arange(33) < np.array([[33], [1], [20]])).astype("int32")]


def build_large(folder: Path, scratch: Path) -> None:
    """Llama-3.1-8B's shape, for the clock."""
    for quantization in ("q0f16", "q4f16_1"):
        for_gpu(LLAMA_8B, "llama", quantization, folder / f"llama8b_{quantization}.so", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    builders = {"decoders": build_decoders, "encoders": build_encoders, "large": build_large}
    parser.add_argument("--only", choices=list(builders))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, build in builders.items():
            if options.only in (None, name):
                build(options.folder, Path(scratch))


if __name__ == "__main__":
    main()
