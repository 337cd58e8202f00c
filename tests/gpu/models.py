# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Compiles the models that the GPU tests and benches run, on a machine with TVM's compiler, torch
and nvcc but no GPU. What is written here runs on TVM's runtime alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


class Unmaterialised:
    """A weight of which only shape and dtype matter: the device makes one up."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype, self.ndim = shape, np.dtype(dtype), len(shape)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is not np.concatenate or kwargs or len(args) != 1:
            return NotImplemented
        (parts,) = args
        rows = sum(part.shape[0] for part in parts)
        return Unmaterialised((rows, *parts[0].shape[1:]), self.dtype.name)


def _import(sizes: dict[str, Any], dtype: str) -> Any:
    """The model's graph, and weights without contents."""
    from transformers import LlamaConfig

    from relax_passes import importer

    config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    module, names = importer._export(importer._skeleton(config, dtype))
    inputs = int(module["main"].attrs["num_input"])
    shapes = [tuple(int(n) for n in var.ty.shape.values) for var in module["main"].params[inputs:]]
    params = {name[0]: Unmaterialised(s, dtype) for name, s in zip(names, shapes, strict=True)}
    return importer.ImportedCausalLM(
        module=module,
        params=params,  # type: ignore[arg-type]
        config={},
        architecture="LlamaForCausalLM",
        family="llama",
        dtype=dtype,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
    )


def _describe(compiled: Any) -> dict[str, Any]:
    return {
        "params": [[list(value.shape), str(value.dtype)] for value in compiled.params.values()],
        "max_batch": compiled.max_batch,
        "max_seq_len": compiled.max_seq_len,
        "prefill_chunk_size": compiled.prefill_chunk_size,
        "page_size": compiled.page_size,
    }


def build_tiny(folder: Path, arch: str) -> None:
    """A model small enough to carry with its weights, captured and not, with torch's logits."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from relax_passes.importer import import_causal_lm
    from relax_passes.pipeline import compile_causal_lm

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            mean, spread = (1.0, 0.2) if parameter.ndim == 1 else (0.0, 0.08)
            parameter.normal_(mean, spread)
            parameter.copy_(parameter.half().float())
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], (4, 300))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    imported = import_causal_lm(model, dtype="float16")
    for name, cuda_graph in (("tiny", True), ("tiny_eager", False)):
        compiled = compile_causal_lm(
            imported,
            target=f"cuda -arch={arch}",
            max_batch=8,
            max_seq_len=1024,
            prefill_chunk_size=128,
            cuda_graph=cuda_graph,
        )
        compiled.export_library(folder / f"{name}.so")
        (folder / f"{name}.json").write_text(json.dumps(_describe(compiled)))
    np.savez(folder / "tiny_reference.npz", ids=ids.astype(np.int32), logits=expected)
    np.savez(
        folder / "tiny_params.npz",
        **{f"{n:04d}": value for n, value in enumerate(compiled.params.values())},
    )


def build_large(folder: Path, arch: str) -> None:
    """Llama-3.1-8B's shape."""
    from relax_passes.pipeline import compile_causal_lm

    compiled = compile_causal_lm(
        _import(LLAMA_8B, "float16"),
        target=f"cuda -arch={arch}",
        max_batch=64,
        max_seq_len=4352,
        prefill_chunk_size=512,
        progress=print,
    )
    compiled.export_library(folder / "llama8b.so")
    (folder / "llama8b.json").write_text(json.dumps(_describe(compiled)))


def build_large_tir(folder: Path, arch: str) -> None:
    """The same model and linear layers with TVM's paged KV cache and its TIR kernels, as a peer.

    TVM's attention is called by a name that graph capture excludes, so nothing is captured.
    """
    import tvm

    from relax_passes.combine_linear import combine_parallel_linears
    from relax_passes.paginate import PaginateAttention
    from relax_passes.pipeline import resolve_target
    from relax_passes.pipeline_cuda import lower_pipeline, toolchain

    imported = _import(LLAMA_8B, "float16")
    target = resolve_target(f"cuda -arch={arch}")
    module, params = combine_parallel_linears(imported.module, imported.params)
    paginate = PaginateAttention(
        "tir", target=target, max_seq_len=4352, prefill_chunk_size=512, max_batch=64
    )
    with toolchain(target):
        executable = tvm.compile(
            tvm.transform.Sequential([paginate])(module),
            target=target,
            relax_pipeline=lower_pipeline(target, capture=False),
        )
    executable.export_library(str(folder / "llama8b_tir.so"))
    about = json.loads((folder / "llama8b.json").read_text())
    about["params"] = [[list(value.shape), str(value.dtype)] for value in params.values()]
    (folder / "llama8b_tir.json").write_text(json.dumps(about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--only", choices=["tiny", "large", "tir"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    builders = {"tiny": build_tiny, "large": build_large, "tir": build_large_tir}
    for name, build in builders.items():
        if options.only in (None, name):
            build(options.folder, options.arch)


if __name__ == "__main__":
    main()
