"""Tiny random models of many architectures, exported and imported as a user would."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
import tvm
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from relax_passes.inject import InjectAttention
from relax_passes.report import Report
from relax_passes.targets import resolve_target

VOCAB, BATCH, LENGTH, HEADS = 32, 2, 12, 4
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": HEADS,
    "vocab_size": VOCAB,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_WINDOW = {"sliding_window": 5, "query_pre_attn_scalar": 16}
#: name: (config class, model class, config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_COMMON, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, **_WINDOW}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GROUPED, **_WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_COMMON, "num_key_value_heads": 2, **_NO_TOKENS}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": HEADS,
            "vocab_size": VOCAB,
            "n_positions": 64,
            **_NO_TOKENS,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_COMMON, "rotary_pct": 0.5}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 64,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 64,
            **_NO_TOKENS,
        },
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCAB},
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {
            "d_model": 64,
            "n_layers": 2,
            "n_heads": HEADS,
            "vocab_size": VOCAB,
            "max_seq_len": 64,
            "expansion_ratio": 1,
        },
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "vocab_size": VOCAB,
            "multi_query": True,
            "new_decoder_architecture": False,
        },
    ),
    "t5_encoder": ("T5Config", "T5EncoderModel", _T5),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "bert": ("BertConfig", "BertModel", _COMMON),
    "whisper_encoder": (
        "WhisperConfig",
        "WhisperEncoder",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": HEADS,
            "encoder_ffn_dim": 64,
            "vocab_size": VOCAB,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "vit": (
        "ViTConfig",
        "ViTModel",
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
    "clip": (
        "CLIPTextConfig",
        "CLIPTextModel",
        {**_COMMON, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
}
_CAUSAL = ("ForCausalLM", "LMHeadModel")


class OneOutput(torch.nn.Module):
    """A model as a function of tensors that returns its main output."""

    def __init__(self, name: str, attention: str) -> None:
        super().__init__()
        config_class, model_class, options = MODELS[name]
        config = getattr(transformers, config_class)(**options)
        config._attn_implementation = attention
        if name == "whisper_encoder":
            from transformers.models.whisper.modeling_whisper import WhisperEncoder

            self.model = WhisperEncoder(config)
        else:
            self.model = getattr(transformers, model_class)(config)
        self.kind = name
        self.cached = model_class.endswith(_CAUSAL)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2)
        self.eval()

    def forward(self, x: Any, mask: Any = None) -> Any:
        options: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if self.cached:
            options["use_cache"] = False
        if self.kind == "t5":
            options.update(decoder_input_ids=x, use_cache=False)
        out = self.model(x, **options)
        return out.logits if hasattr(out, "logits") else out[0]


def example(name: str) -> tuple[torch.Tensor, ...]:
    """Inputs: token ids and a padding mask, or features."""
    generator = torch.Generator().manual_seed(1)
    if name == "whisper_encoder":
        return (torch.randn(BATCH, 8, 32, generator=generator),)
    if name == "vit":
        return (torch.randn(BATCH, 3, 32, 32, generator=generator),)
    ids = torch.randint(1, VOCAB, (BATCH, LENGTH), generator=generator)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, LENGTH - 3 :] = 0
    return ids, mask


def import_module(
    module: torch.nn.Module, args: tuple[torch.Tensor, ...], *, dynamic: bool = False
) -> tvm.IRModule:
    """``torch.export`` and TVM's importer with its defaults; ``dynamic`` in axis 1."""
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            module.eval(),
            args,
            dynamic_shapes=tuple({1: length} for _ in args) if dynamic else None,
        )
    return from_exported_program(program, unwrap_unit_return_tuple=True)


def inject(mod: tvm.IRModule) -> tuple[tvm.IRModule, Report]:
    report = Report()
    return InjectAttention(target=resolve_target("native"), report=report)(mod), report


def run(mod: tvm.IRModule, args: tuple[Any, ...]) -> np.ndarray:
    """Compile with TVM's default pipeline and call ``main``."""
    executable = tvm.compile(mod, target=resolve_target("native"))
    vm = relax.VirtualMachine(executable, tvm.cpu())
    out = vm["main"](*[tvm.runtime.tensor(np.asarray(a)) for a in args])
    return (out if hasattr(out, "numpy") else out[0]).numpy()


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def attention_sized(mod: tvm.IRModule, queries: int, keys: int, least: int) -> list[str]:
    """Variables of [.., queries, keys] with at least ``least`` elements."""
    found = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            ty = binding.var.ty
            if not isinstance(ty, relax.TensorType) or ty.ndim < 3:
                continue
            shape = [int(n) if hasattr(n, "value") else -1 for n in ty.shape.values]
            if shape[-2:] == [queries, keys] and np.prod(shape) >= least:
                found.append(binding.var.name)
    return found
