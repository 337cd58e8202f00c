"""MLCEngine itself, over our cache and over its own: the same text.

Needs mlc_llm's C++ library. The model is this repository's example checkpoint, so that an answer
is one, and a wrong token would show. Speculative decoding isn't here: with either cache mlc_llm's
sampler for CPUs refuses a batch of drafts (its own check of the number of requests).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

with contextlib.suppress(ImportError):
    from story_model import library, model_folder

QUESTIONS = [
    "Please tell me a story about Anna and a dog.",
    "Who are you?",
    "Tell me a story.",
    "Finn walked to the lake. Rosa walked to the castle. Where is Rosa?",
]
SIZES = {"max_num_sequence": 40, "max_total_sequence_length": 8192, "prefill_chunk_size": 1024}

Ask = Callable[[Any], list[str]]


@pytest.fixture(scope="module", autouse=True)
def needs_the_library() -> None:
    from tvm_flashinfer.mlc.bridges import library_file

    if library_file() is None:
        pytest.skip("mlc_llm's C++ library (libmlc_llm_module.so) isn't there")


@contextlib.contextmanager
def engine(cache: str, kind: str = "MLCEngine", **options: Any) -> Iterator[Any]:
    import mlc_llm
    from mlc_llm.serve import EngineConfig

    config = EngineConfig(**(SIZES | options))
    made = getattr(mlc_llm, kind)(
        str(model_folder()),
        device="cpu",
        model_lib=str(library(cache)),
        mode="server",
        engine_config=config,
    )
    try:
        yield made
    finally:
        made.terminate()


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def answer(engine: Any, text: str, **options: Any) -> Any:
    options = {"max_tokens": 60, "temperature": 0.0} | options
    return engine.chat.completions.create(messages=message(text), **options)


def texts(response: Any) -> list[str]:
    return [choice.message.content for choice in response.choices]


def completions(engine: Any) -> list[str]:
    found = [texts(answer(engine, question))[0] for question in QUESTIONS]
    assert "storyteller" in found[1]
    return found


def streams(engine: Any) -> list[str]:
    found = []
    for question in QUESTIONS:
        parts = answer(engine, question, stream=True)
        found.append("".join(c.delta.content or "" for part in parts for c in part.choices))
    return found


def eight_at_once(engine: Any) -> list[str]:
    """Parallel generation: one prompt, forked; sampled with a seed."""
    found = texts(answer(engine, QUESTIONS[2], n=8, temperature=1.0, seed=7))
    assert len(found) == 8 and len(set(found)) > 1
    return found


def a_conversation(engine: Any) -> list[str]:
    """Turns share what was said: the engine finds it in its prefix cache."""
    said = message(QUESTIONS[0])
    found = []
    for turn in range(3):
        response = engine.chat.completions.create(messages=said, max_tokens=50, temperature=0.0)
        found.append(response.choices[0].message.content)
        said.append({"role": "assistant", "content": found[-1].lstrip()})
        said += message("What did Anna find?")
        extra = response.usage.extra
        if turn:
            assert extra["prefill_tokens"] < extra["prompt_tokens"] / 2
    return found


def json_only(engine: Any) -> list[str]:
    """A grammar masks logits and forces tokens, which jump-forward decoding appends."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Anna", "Finn"]}, "friends": {"type": "boolean"}},
        "required": ["name", "friends"],
    }
    form = {"type": "json_object", "schema": json.dumps(schema)}
    found = texts(answer(engine, QUESTIONS[0], response_format=form))
    assert json.loads(found[0])["name"] in ("Anna", "Finn")
    return found


@pytest.mark.parametrize(
    "ask",
    [completions, streams, eight_at_once, a_conversation, json_only],
    ids=lambda f: f.__name__,
)
def test_the_same_text_over_either_cache(ask: Ask) -> None:
    found = {}
    for cache in ("ours", "tvm"):
        with engine(cache) as made:
            found[cache] = ask(made)
    assert found["ours"] == found["tvm"]
    assert all(found["ours"])


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 16},
        {"prefill_mode": "chunked"},
        {"prefix_cache_mode": "disable"},
        {"max_num_sequence": 2, "max_total_sequence_length": 256},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_engine_change_no_text(options: dict[str, Any]) -> None:
    with engine("ours") as made:
        expected = completions(made)
    with engine("ours", **options) as made:
        assert completions(made) == expected


def test_many_requests_at_once() -> None:
    """Thirty-two, of different lengths, each answered as if it were alone."""
    questions = [f"{'Anna ate a carrot. ' * (i % 5)}{QUESTIONS[i % 4]}" for i in range(32)]

    async def ask_all(made: Any) -> list[str]:
        async def ask(question: str) -> str:
            response = await made.chat.completions.create(
                messages=message(question), max_tokens=40, temperature=0.0
            )
            return str(response.choices[0].message.content)

        return list(await asyncio.gather(*map(ask, questions)))

    found = {}
    for cache in ("ours", "tvm"):
        with engine(cache, "AsyncMLCEngine") as made:
            found[cache] = asyncio.run(ask_all(made))
    assert found["ours"] == found["tvm"]
    with engine("ours") as made:
        assert found["ours"] == [texts(answer(made, q, max_tokens=40))[0] for q in questions]
