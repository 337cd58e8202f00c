"""Compiled models answer as transformers does, token for token, alone and batched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FAMILIES, VOCAB

from tvm_flashinfer.engine import Engine, SamplingParams

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "storyteller"
NEW_TOKENS = 64


def reference(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """transformers' greedy answers; prompts of one length are batched, so nothing is padded."""
    import torch

    answers: dict[int, list[int]] = {}
    lengths = {len(prompt) for prompt in prompts}
    for length in lengths:
        group = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in group])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        for i, row in zip(group, out[:, length:].tolist(), strict=True):
            answers[i] = row[: row.index(0) + 1] if 0 in row else row
    return [answers[i] for i in range(len(prompts))]


def random_prompts(count: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, lengths[i % len(lengths)]).tolist() for i in range(count)]


def tokens(engine: Engine, prompts: list[Any], count: int) -> list[list[int]]:
    answers = engine.generate(prompts, SamplingParams(max_tokens=count))
    return [list(answer.token_ids) for answer in answers]


def assert_equal_alone_and_batched(
    engine: Engine, prompts: list[list[int]], want: list[list[int]], count: int
) -> None:
    assert tokens(engine, prompts, count) == want
    assert [tokens(engine, [prompt], count)[0] for prompt in prompts] == want
    assert engine.stats.free_pages == engine.stats.total_pages


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, checkpoint: Callable, compiled: Callable) -> None:
    engine = Engine.load(compiled(family), max_batch=8)
    prompts = random_prompts(32, [1, 2, 5, 16, 17, 40, 63, 100])
    want = reference(checkpoint(family)[1], prompts, NEW_TOKENS)
    assert_equal_alone_and_batched(engine, prompts, want, NEW_TOKENS)


def test_tvms_own_attention_is_driven_by_the_same_code(
    checkpoint: Callable, compiled: Callable
) -> None:
    engine = Engine.load(compiled("llama", attention="tir"))
    prompts = random_prompts(8, [1, 5, 33, 60])
    assert tokens(engine, prompts, 24) == reference(checkpoint("llama")[1], prompts, 24)
    assert engine.stats.free_pages == engine.stats.total_pages


def test_the_example_checkpoint_equals_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tvm_flashinfer.cli.compile import Options, compile_checkpoint

    compile_checkpoint(EXAMPLE, tmp_path / "model", Options(), lambda _: None)
    engine = Engine.load(tmp_path / "model")
    starts = ["Once upon a time", "There was a", "Q: What is the opposite of hot? A:", "The"]
    names = ["Anna", "Tom", "a dog", "the old man", "Mia", "a bird", "Ben", "the girl"]
    texts = [f"{start} {name}" for start in starts for name in names]
    prompts = [engine.tokenizer.encode(text) for text in texts]
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE).eval()
    want = reference(model, prompts, NEW_TOKENS)
    assert_equal_alone_and_batched(engine, prompts, want, NEW_TOKENS)


def test_two_hundred_requests_in_a_pool_for_fifty(compiled: Callable) -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 60, 200).tolist()
    prompts = random_prompts(200, lengths, seed=2)
    params = [SamplingParams(max_tokens=int(n)) for n in rng.integers(1, 24, 200)]
    whole = sum(len(p) + q.max_tokens for p, q in zip(prompts, params, strict=True))
    directory = compiled("llama")
    engine = Engine.load(directory, kv_tokens=whole // 4)
    together = engine.generate(prompts, params)
    stats = engine.stats
    assert stats.free_pages == stats.total_pages
    assert 8 < stats.peak_batch < 64
    single = Engine.load(directory, max_batch=1)
    for prompt, param, answer in zip(prompts, params, together, strict=True):
        (alone,) = single.generate([prompt], param)
        assert answer.token_ids == alone.token_ids
        assert answer.finish_reason == alone.finish_reason


def test_a_pool_too_small_for_the_batch_preempts(compiled: Callable) -> None:
    directory = compiled("llama")
    prompts = random_prompts(8, [15])
    small, large = Engine.load(directory, kv_tokens=160), Engine.load(directory)
    assert tokens(small, prompts, 60) == tokens(large, prompts, 60)
    assert small.stats.preemptions > 0
    assert large.stats.preemptions == 0


def test_a_session_continues_on_the_cache(compiled: Callable) -> None:
    engine = Engine.load(compiled("llama"))
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    session = engine.session()
    history: list[int] = []
    for turn in random_prompts(4, [7, 20, 1, 16]):
        history += turn
        before = engine.stats.prefill_tokens
        got = [d.token_id for d in engine.stream(history, params, session=session)]
        assert engine.stats.prefill_tokens - before <= len(turn) + 1
        assert got == tokens_of(engine, history, params)
        history += got
    session.reset()
    assert engine.stats.free_pages == engine.stats.total_pages


def tokens_of(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    (answer,) = engine.generate([prompt], params)
    return list(answer.token_ids)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_models_run(dtype: str, compiled: Callable) -> None:
    engine = Engine.load(compiled("qwen2", dtype=dtype))
    exact = Engine.load(compiled("qwen2"))
    prompts = random_prompts(8, [9, 30])
    got, want = tokens(engine, prompts, 4), tokens(exact, prompts, 4)
    # Rounding may turn a near tie, so not every answer has to agree to its end.
    agree = sum(a == b for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
    assert agree >= 0.8 * 4 * len(prompts)
