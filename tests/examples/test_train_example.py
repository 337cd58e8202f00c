"""The training script: its text encoding, its loss weights, and a run of a few steps."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
import train_example
from storyteller.checkpoint import MAX_POSITIONS, VOCAB_SIZE, train_tokenizer
from storyteller.dialogue import text_of, write_document
from storyteller.training import batches, encode
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(text_of(write_document(Random(seed))) for seed in range(300))


TOKENS = 1024


def test_a_document_is_encoded_as_its_text_is(tokenizer: Tokenizer) -> None:
    """Segments are cut where the tokenizer cuts too, so a typed prompt gives trained tokens."""
    for seed in range(200):
        document = write_document(Random(seed))
        ids, weights = encode(tokenizer, document)
        assert ids == tokenizer.encode(text_of(document)).ids[:MAX_POSITIONS]
        assert len(weights) == len(ids)


@pytest.mark.parametrize("text", ["Zoë's naïve café 🦊", "日本語\n\ttabs", "", "</s>Q: Hi! A:"])
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_batches_hold_one_document_a_row_and_little_padding(tokenizer: Tokenizer) -> None:
    stream = batches(tokenizer, Random(0), steps=50, tokens=TOKENS)
    real = padded = 0
    for _ in range(50):
        ids, weights = next(stream)
        assert ids.shape == weights.shape
        assert ids.numel() <= TOKENS or ids.shape[0] == 1
        assert int(ids.max()) < VOCAB_SIZE
        real += int((weights > 0).sum())
        padded += ids.numel()
        for row, weight in zip(ids, weights, strict=True):
            length = int((weight > 0).sum())
            assert torch.all(weight[:length] > 0) and torch.all(weight[length:] == 0)
            assert torch.all(row[length:] == 0)
    assert real > 0.9 * padded


def test_a_smoke_run_writes_a_directory_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    run = CliRunner().invoke(train_example.app, ["--smoke", "--threads", "1", "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert {file.name for file in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], VOCAB_SIZE)
    assert "3 steps" in (out / "README.md").read_text(encoding="utf-8")
