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


def injected_module() -> Any:
    """Three attentions in a row, as a torch model: plain and grouped; capped, in a window and with
    ALiBi; and one whose heads lie outside its tokens, under a mask that is given."""
    import torch

    heads, kv_heads, dim = 4, 2, 64

    class Attentions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = heads * dim
            self.qkv = torch.nn.ModuleList(
                torch.nn.Linear(width, (heads + 2 * n) * dim) for n in (kv_heads, heads)
            )
            self.register_buffer("slope", 2.0 ** -torch.arange(1.0, heads + 1))

        def split(self, x: torch.Tensor, n: int, kv: int) -> list[torch.Tensor]:
            b, s, _ = x.shape
            parts = self.qkv[n](x).split([heads * dim, kv * dim, kv * dim], -1)
            return [p.view(b, s, -1, dim).transpose(1, 2) for p in parts]

        def forward(self, x: torch.Tensor, q: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            b, s, width = x.shape
            plain = torch.nn.functional.scaled_dot_product_attention(
                *self.split(x, 0, kv_heads), is_causal=True, enable_gqa=True
            )
            x = plain.transpose(1, 2).reshape(b, s, width)
            at = torch.arange(s)
            distance = at[None, :] - at[:, None]
            query, key, value = self.split(x, 1, heads)
            scores = (query @ key.transpose(2, 3)).float() * dim**-0.5
            scores = 5.0 * torch.tanh(scores / 5.0) + self.slope[:, None, None] * distance
            seen = (distance <= 0) & (distance > -40)
            scores = scores.masked_fill(~seen, float("-inf"))
            own = torch.softmax(scores, -1).to(value.dtype) @ value
            masked = torch.nn.functional.scaled_dot_product_attention(
                q, key, value, attn_mask=visible
            )
            return own.transpose(1, 2).reshape(b, s, width), masked

    torch.manual_seed(0)
    return Attentions().eval()


def injected_inputs() -> tuple[Any, ...]:
    """x [2, S, width], q [2, heads, S, dim] and what of the keys it sees, [2, 1, S, S]."""
    import torch

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 150, 256, generator=generator)
    q = torch.randn(2, 4, 150, 64, generator=generator)
    visible = torch.rand(2, 1, 150, 150, generator=generator) < 0.7
    return x, q, visible | torch.eye(150, dtype=torch.bool)


def build_injected(folder: Path, arch: str) -> None:
    """A torch model without a cache, every attention of which is a kernel of ours."""
    import torch
    import tvm

    from relax_passes.frontend import from_torch
    from relax_passes.inject import InjectAttention
    from relax_passes.pipeline import resolve_target
    from relax_passes.pipeline_cuda import lower_pipeline, toolchain

    model, inputs = injected_module(), injected_inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
        halves = [x.half() if x.is_floating_point() else x for x in inputs]
        exact = [x.double() if x.is_floating_point() else x for x in halves]
        expected = model.double()(*exact)
    module = from_torch(model.half(), halves)
    target = resolve_target(f"cuda -arch={arch}")
    module = InjectAttention(target=target, strict=True)(module)
    with toolchain(target):
        executable = tvm.compile(
            module,
            target=target,
            relax_pipeline=lower_pipeline(target, capture=False),
        )
    executable.export_library(str(folder / "injected.so"))
    np.savez(
        folder / "injected.npz",
        **{f"in{n}": np.asarray(x) for n, x in enumerate(halves)},
        **{f"out{n}": np.asarray(x) for n, x in enumerate(expected)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--only", choices=["tiny", "injected", "large", "tir"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    builders = {
        "tiny": build_tiny,
        "injected": build_injected,
        "large": build_large,
        "tir": build_large_tir,
    }
    for name, build in builders.items():
        if options.only in (None, name):
            build(options.folder, options.arch)


if __name__ == "__main__":
    main()
