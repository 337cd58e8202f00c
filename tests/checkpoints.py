"""Tiny random checkpoints of every supported family, as Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

VOCAB = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model in eval mode, its logits far enough apart for exact comparison.

    The usual initialisation is so small that every next token is about as likely; here weights
    are larger, and what is initialised to a constant (norms, biases) is random too.
    """
    import torch
    import transformers

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config_class = getattr(transformers, f"{names[family]}Config")
    model_class = getattr(transformers, f"{names[family]}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.2)
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(0, 1)
            else:
                parameter.normal_(0, 0.15)
    model.generation_config.do_sample = False
    return model


def make_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer with one special token, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make_checkpoint(family: str, directory: Path, *, tokenizer: bool = True, **changes: Any) -> Any:
    """Writes a checkpoint into ``directory``; returns the model."""
    model = make_model(family, **changes)
    model.save_pretrained(directory)
    if tokenizer:
        make_tokenizer(directory)
    return model
