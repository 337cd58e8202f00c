"""What the trained model is worth: exact answers on stories it has never seen, and samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from storyteller.dialogue import EOS, answer_prompt
from storyteller.facts import FACTS
from storyteller.stories import Question, StoryWriter, questions_about

HELD_OUT_SEED = 1_000_003
"""Evaluation stories come from this generator; training documents never do."""

QUESTIONS_AT_ONCE = 24

SAMPLE_PROMPTS = (
    "Once upon a time there was a girl named",
    "One day a boy named Finn",
    "Q: Tell me a story about Rosa and a fox. A:",
    "Anna found a red ball. Anna gave the ball to Tom. Q: Who has the ball? A:",
    "Anna found a red ball. Tom went to the park. Q: Where is Tom? A:",
    "Q: What is the opposite of hot? A:",
    "Q: Who are you? A:",
)


@dataclass(frozen=True)
class Asked:
    """One held-out question: the story it is about (empty for a general one), and itself."""

    story: str
    question: Question

    @property
    def prompt(self) -> str:
        return answer_prompt(self.story, self.question.text)


def held_out_questions(stories: int, seed: int = HELD_OUT_SEED) -> Iterator[Asked]:
    """All questions about ``stories`` fresh stories."""
    rng = Random(seed)
    for _ in range(stories):
        story = StoryWriter(rng).write()
        for question in questions_about(story, rng):
            yield Asked(story.text, question)


def general_questions() -> Iterator[Asked]:
    """Every general question, without a story."""
    for text, answer in FACTS.items():
        yield Asked("", Question("fact", text, answer))


@torch.no_grad()
def generate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, max_tokens: int = 200
) -> tuple[str, bool]:
    """The greedy continuation of ``prompt`` and whether it ended by itself."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens
    )[0, ids.shape[1] :].tolist()
    ended = output[-1] == tokenizer.token_to_id(EOS)
    return tokenizer.decode(output, skip_special_tokens=True), ended


@torch.no_grad()
def answered_exactly(
    model: LlamaForCausalLM, tokenizer: Tokenizer, questions: Sequence[Asked]
) -> list[bool]:
    """Which greedy answers are right to the letter, end of text included.

    Every token of the right answer must be the likeliest one after those before it, which is what
    greedy decoding would have written; one forward pass over all questions tells. Padding is on the
    right, where causal attention hides it.
    """
    prompts = [tokenizer.encode(asked.prompt).ids for asked in questions]
    answers = [tokenizer.encode(f" {asked.question.answer}{EOS}").ids for asked in questions]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(questions), width, dtype=torch.int64)
    for row, prompt, answer in zip(ids, prompts, answers, strict=True):
        row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    likeliest = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    return [
        row[len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist() == answer
        for row, prompt, answer in zip(likeliest, prompts, answers, strict=True)
    ]


@dataclass(frozen=True)
class Score:
    """Right answers out of all, for each kind of question."""

    right: Counter[str]
    total: Counter[str]

    @property
    def accuracy(self) -> float:
        return self.right.total() / max(1, self.total.total())


def score(model: LlamaForCausalLM, tokenizer: Tokenizer, questions: Iterable[Asked]) -> Score:
    """Asks every question."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    waiting = list(questions)
    for start in range(0, len(waiting), QUESTIONS_AT_ONCE):
        batch = waiting[start : start + QUESTIONS_AT_ONCE]
        for asked, exact in zip(batch, answered_exactly(model, tokenizer, batch), strict=True):
            total[asked.question.kind] += 1
            right[asked.question.kind] += exact
    return Score(right, total)
