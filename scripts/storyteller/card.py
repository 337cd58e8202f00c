"""The model card: what the checkpoint is, how it was made and how well it does."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from storyteller.evaluation import Score

WEAK = 0.9

_CARD = """\
# Storyteller

A Llama-architecture model of {run.parameters:,} parameters that tells very small stories and
answers questions about them. It is the example checkpoint of this repository: small enough to be
committed and to be trained again in minutes, and still a real model whose answers can be checked.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: {c.num_hidden_layers} layers, width {c.hidden_size}, SwiGLU {c.intermediate_size}, RMSNorm, RoPE, tied embeddings |
| attention | {c.num_attention_heads} query heads on {c.num_key_value_heads} key/value heads of {c.head_dim} (grouped-query attention) |
| context | {c.max_position_embeddings} tokens |
| tokenizer | byte-level BPE, {c.vocab_size} tokens; `</s>` ends an answer and a story; no BOS |
| weights | float32 |
| training text | written by the script itself, in English, from `scripts/storyteller`; nothing is downloaded |
| training | {run.steps} steps of {run.tokens} tokens, {run.minutes:.0f} minutes on `{run.device}`, text from {run.writers} processes, seed {run.seed} |

## How to talk to it

A conversation is one line; the model writes what follows `A:` up to `</s>`.
`tokenizer_config.json` holds the same form as a chat template.

```text
Q: <what you say> A: <what it says></s>Q: <what you say> A:
```

Ask for a story (`Tell me a story.`, `Please tell me a story about Anna and a dog.`) or tell one,
then ask. It knows the words of `scripts/storyteller/lexicon.py`, the questions of `stories.py`
(where somebody is, what they found, ate or feel, who has what, its colour, ...), {facts} general
questions of `facts.py` by heart, and nothing else.

## How well it does

Greedy answers compared letter for letter, on {held_out} questions about stories it never saw and
on every general question: **{accuracy:.1%}** and **{facts_accuracy:.1%}**.

{weak}

| kind of question | right | asked |
|---|---|---|
{kinds}

## What it says

Greedy, from the committed weights; a prompt stands in bold.

{samples}

## How to make it again

```sh
pip install -e '.[torch]'
python scripts/train_example.py --steps {run.steps} --tokens {run.tokens} --seed {run.seed} --writers {run.writers}
```

The seed fixes the text, the first weights and the order of training. The same device and PyTorch
give the same file at best; elsewhere sums round differently, which is enough to end in other
weights, other stories and somewhat other scores.
"""  # noqa: E501 - rows of Markdown tables


@dataclass(frozen=True)
class CardFacts:
    """The model's shape and the run that trained it."""

    config: LlamaConfig
    parameters: int
    steps: int
    tokens: int
    """Of a step."""
    seed: int
    writers: int
    device: str
    minutes: float


def _weak_spots(stories: Score) -> str:
    """A sentence on the kinds of question that are often answered wrongly."""
    share = {kind: stories.right[kind] / total for kind, total in stories.total.items()}
    weak = sorted((kind for kind in share if share[kind] < WEAK), key=lambda kind: share[kind])
    if not weak:
        return f"No kind of question is right less often than {WEAK:.0%} of the time."
    return f"It is weak (under {WEAK:.0%}) at these kinds: {', '.join(weak)}."


def model_card(run: CardFacts, stories: Score, facts: Score, samples: list[tuple[str, str]]) -> str:
    """The card as Markdown.

    Args:
        run: the model's shape and its training.
        stories: score on questions about held-out stories.
        facts: score on the general questions.
        samples: prompts and what the model wrote after each.
    """
    kinds = "\n".join(
        f"| {kind} | {stories.right[kind]} | {stories.total[kind]} |"
        for kind in sorted(stories.total)
    )
    return _CARD.format(
        c=run.config,
        run=run,
        held_out=stories.total.total(),
        accuracy=stories.accuracy,
        facts=facts.total.total(),
        facts_accuracy=facts.accuracy,
        weak=_weak_spots(stories),
        kinds=kinds,
        samples="\n\n".join(f"> **{prompt}**{text}" for prompt, text in samples),
    )
