"""The committed checkpoint: small, loadable, able to tell a story and to answer about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from story_reader import Reader
from storyteller import lexicon, stories
from storyteller.dialogue import CHAT_TEMPLATE, text_of, turn
from storyteller.evaluation import (
    general_questions,
    generate,
    held_out_questions,
    score,
)
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

MAX_BYTES = 4_000_000
UNSEEN_SEED = 77
"""Neither the training run's stories nor those the model card was measured on."""
WEAK_KINDS = {"color"}
"""What the model card admits to."""


@pytest.fixture(scope="module")
def model(checkpoint_dir: Path, one_thread: None) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint_dir).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def vocabulary() -> set[str]:
    """Every word the generator can put into a story."""
    words = {
        word
        for seed in range(300)
        for word in re.findall(r"[A-Za-z]+", stories.StoryWriter(Random(seed)).write().text)
    }
    return words | set(lexicon.GIRLS + lexicon.BOYS + lexicon.PET_NAMES)


def test_it_is_small(checkpoint_dir: Path) -> None:
    assert sum(file.stat().st_size for file in checkpoint_dir.iterdir()) <= MAX_BYTES


def test_its_shape_exercises_the_attention_kernels(checkpoint_dir: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint_dir)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert 32 <= config.head_dim <= 256
    assert config.max_position_embeddings >= 512


def test_it_answers_questions_about_unseen_stories(model: Any, tokenizer: Tokenizer) -> None:
    result = score(model, tokenizer, held_out_questions(stories=25, seed=UNSEEN_SEED))
    assert result.total.total() > 250
    assert result.accuracy >= 0.93, result
    strong = result.total.keys() - WEAK_KINDS
    right = sum(result.right[kind] for kind in strong)
    assert right >= 0.99 * sum(result.total[kind] for kind in strong), result


def test_it_knows_the_general_answers(model: Any, tokenizer: Tokenizer) -> None:
    assert score(model, tokenizer, general_questions()).accuracy >= 0.95


@pytest.mark.parametrize(
    "prompt",
    ["Once upon a time", "One day a boy named Sam", "Q: Tell me a story about Lily and a cat. A:"],
)
def test_it_tells_a_story_in_words_and_stops(
    model: Any, tokenizer: Tokenizer, vocabulary: set[str], prompt: str
) -> None:
    text, ended = generate(model, tokenizer, prompt)
    words = re.findall(r"[A-Za-z]+", text)
    assert ended and text.endswith("The end.")
    assert len(words) > 30
    assert sum(word in vocabulary for word in words) >= 0.98 * len(words), text


def test_the_chat_template_writes_what_the_model_was_trained_on(checkpoint_dir: Path) -> None:
    settings = json.loads((checkpoint_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == CHAT_TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    messages = [
        {"role": "user", "content": "Hi! "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who are you?"},
    ]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == text_of(turn("Hi!", "Hello!")) + "Q: Who are you? A:"


def test_a_chat_remembers_the_story_it_told(model: Any, checkpoint_dir: Path) -> None:
    """Asks for a story, then about it, over several turns of one conversation."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    messages: list[dict[str, str]] = []

    def say(text: str) -> str:
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer, ended = generate(model, tokenizer.backend_tokenizer, prompt)
        assert ended
        messages.append({"role": "assistant", "content": answer})
        return answer.strip()

    told = say("Tell me a story about Mia and Ben.")
    assert "Mia" in told and "Ben" in told
    reader = Reader(told)
    questions = ("Where is Mia?", "Where is Ben?", "Who is the story about?")
    assert [say(question) for question in questions] == [reader.answer(q) for q in questions]
