"""Random models of many architectures, of any size: what the passes are measured and tested on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

__all__ = ["Size", "ZooModel", "architectures", "example"]

PATCH = 8
_CAUSAL = ("ForCausalLM", "LMHeadModel")
#: Models that take features, not token ids.
_FEATURES = ("vit", "whisper_encoder")


@dataclasses.dataclass(frozen=True)
class Size:
    """Dimensions that all architectures share; the default is the least with every feature."""

    hidden: int = 64
    intermediate: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 32
    positions: int = 64
    batch: int = 2
    length: int = 12
    window: int = 5
    #: Tokens of the Whisper encoder, and pixels on a side of ViT's image.
    frames: int = 16
    image: int = 32

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def tokens(self, name: str) -> int:
        """The length of the sequence that a model attends over."""
        patches = (self.image // PATCH) ** 2
        return {"whisper_encoder": self.frames, "vit": patches + 1}.get(name, self.length)


def architectures(size: Size) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """name: (config class, model class, options of the config)"""
    common: dict[str, Any] = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": size.positions,
    }
    grouped = {**common, "num_key_value_heads": size.kv_heads, "head_dim": size.head_dim}
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    t5 = {
        "d_model": size.hidden,
        "d_kv": size.head_dim,
        "d_ff": size.intermediate,
        "num_layers": size.layers,
        "num_heads": size.heads,
        "vocab_size": size.vocab,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    window = {"sliding_window": size.window, "query_pre_attn_scalar": size.head_dim}
    return {
        "llama": ("LlamaConfig", "LlamaForCausalLM", grouped),
        "mistral": (
            "MistralConfig",
            "MistralForCausalLM",
            {**grouped, "sliding_window": size.window},
        ),
        "qwen2": (
            "Qwen2Config",
            "Qwen2ForCausalLM",
            {**common, "num_key_value_heads": size.kv_heads},
        ),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", grouped),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**grouped, **window}),
        "gemma3": (
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            {
                **grouped,
                **window,
                "layer_types": [
                    ("sliding_attention", "full_attention")[n % 2] for n in range(size.layers)
                ],
            },
        ),
        "phi3": (
            "Phi3Config",
            "Phi3ForCausalLM",
            {**common, "num_key_value_heads": size.kv_heads, **no_tokens},
        ),
        "gpt2": (
            "GPT2Config",
            "GPT2LMHeadModel",
            {
                "n_embd": size.hidden,
                "n_layer": size.layers,
                "n_head": size.heads,
                "vocab_size": size.vocab,
                "n_positions": size.positions,
                **no_tokens,
            },
        ),
        "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**common, "rotary_pct": 0.5}),
        "opt": (
            "OPTConfig",
            "OPTForCausalLM",
            {
                "hidden_size": size.hidden,
                "ffn_dim": size.intermediate,
                "num_hidden_layers": size.layers,
                "num_attention_heads": size.heads,
                "vocab_size": size.vocab,
                "max_position_embeddings": size.positions,
                "word_embed_proj_dim": size.hidden,
                **no_tokens,
            },
        ),
        "bloom": (
            "BloomConfig",
            "BloomForCausalLM",
            {
                "hidden_size": size.hidden,
                "n_layer": size.layers,
                "n_head": size.heads,
                "vocab_size": size.vocab,
            },
        ),
        "mpt": (
            "MptConfig",
            "MptForCausalLM",
            {
                "d_model": size.hidden,
                "n_layers": size.layers,
                "n_heads": size.heads,
                "vocab_size": size.vocab,
                "max_seq_len": size.positions,
                "expansion_ratio": max(1, size.intermediate // size.hidden),
            },
        ),
        "falcon": (
            "FalconConfig",
            "FalconForCausalLM",
            {
                "hidden_size": size.hidden,
                "num_hidden_layers": size.layers,
                "num_attention_heads": size.heads,
                "vocab_size": size.vocab,
                "multi_query": True,
                "new_decoder_architecture": False,
            },
        ),
        "t5_encoder": ("T5Config", "T5EncoderModel", t5),
        "t5": ("T5Config", "T5ForConditionalGeneration", t5),
        "bert": ("BertConfig", "BertModel", common),
        "whisper_encoder": (
            "WhisperConfig",
            "WhisperEncoder",
            {
                "d_model": size.hidden,
                "encoder_layers": size.layers,
                "encoder_attention_heads": size.heads,
                "encoder_ffn_dim": size.intermediate,
                "vocab_size": size.vocab,
                "num_mel_bins": 8,
                "max_source_positions": size.frames,
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
                "hidden_size": size.hidden,
                "intermediate_size": size.intermediate,
                "num_hidden_layers": size.layers,
                "num_attention_heads": size.heads,
                "image_size": size.image,
                "patch_size": PATCH,
            },
        ),
        "clip": (
            "CLIPTextConfig",
            "CLIPTextModel",
            {**common, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        ),
    }


class ZooModel(torch.nn.Module):
    """A model as a function of tensors that returns its main output."""

    def __init__(self, name: str, attention: str, size: Size | None = None) -> None:
        super().__init__()
        config_class, model_class, options = architectures(size or Size())[name]
        hidden = (size or Size()).hidden
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
        # Scores of T5 aren't scaled: with this spread they don't grow with the width, where
        # float32 itself, PyTorch's too, would be off by a thousandth.
        spread = 12.8 / hidden
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, spread)
        self.eval()

    def forward(self, x: Any, mask: Any = None) -> Any:
        options: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if self.cached:
            options["use_cache"] = False
        if self.kind == "t5":
            options.update(decoder_input_ids=x, use_cache=False)
        out = self.model(x, **options)
        return out.logits if hasattr(out, "logits") else out[0]


def example(name: str, size: Size | None = None) -> tuple[torch.Tensor, ...]:
    """Inputs: token ids and a padding mask, or features."""
    size = size or Size()
    generator = torch.Generator().manual_seed(1)
    if name == "whisper_encoder":
        return (torch.randn(size.batch, 8, 2 * size.frames, generator=generator),)
    if name == "vit":
        return (torch.randn(size.batch, 3, size.image, size.image, generator=generator),)
    ids = torch.randint(1, size.vocab, (size.batch, size.length), generator=generator)
    mask = torch.ones(size.batch, size.length, dtype=torch.long)
    mask[-1, size.length - 3 :] = 0
    return ids, mask
