"""Continuous batching, admission and preemption, on a model on paper."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_model import PaperModel, continuation

from tvm_flashinfer.engine import Engine, SamplingParams
from tvm_flashinfer.errors import UserError
from tvm_flashinfer.manifest import Generation


def engine_on_paper(pages: int = 16, **changes: object) -> tuple[Engine, PaperModel]:
    model = PaperModel(pages, **changes)
    return Engine(model, None), model  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=25),
    pages=st.integers(13, 30),
    page_size=st.sampled_from([1, 3, 4, 8]),
    max_batch=st.integers(1, 6),
    chunk=st.integers(6, 20),
)
def test_every_request_ends_as_if_it_were_alone(lengths, pages, page_size, max_batch, chunk):
    engine, model = engine_on_paper(
        pages, page_size=page_size, max_batch=max_batch, prefill_chunk_size=chunk
    )
    room = engine.max_prompt_tokens
    prompts = [[(7 * i + j) % 50 for j in range(min(n, room))] for i, (n, _) in enumerate(lengths)]
    params = [SamplingParams(max_tokens=count) for _, count in lengths]
    answers = engine.generate(prompts, params)
    for prompt, (_, count), answer in zip(prompts, lengths, answers, strict=True):
        fits = min(count, room + 1 - len(prompt))
        assert list(answer.token_ids) == continuation(prompt, fits)
        assert answer.finish_reason == ("length" if fits == count else "context")
    assert model.cache == {}
    assert engine.stats.free_pages == pages


def test_a_full_pool_preempts_the_youngest_and_computes_it_again():
    # Four prompts of one page each are admitted together, and grow to three pages each.
    engine, _ = engine_on_paper(pages=8, page_size=4)
    prompts = [[i] * 3 for i in range(4)]
    answers = engine.generate(prompts, SamplingParams(max_tokens=9))
    assert engine.stats.preemptions > 0
    assert [list(a.token_ids) for a in answers] == [continuation(p, 9) for p in prompts]


def test_long_prompts_are_prefilled_in_chunks_beside_others():
    engine, _ = engine_on_paper(pages=40, prefill_chunk_size=8)
    prompts = [list(range(40)), [1, 2], list(range(20))]
    answers = engine.generate(prompts, SamplingParams(max_tokens=5))
    assert [list(a.token_ids) for a in answers] == [continuation(p, 5) for p in prompts]
    assert engine.stats.prefill_tokens >= 60
    assert engine.stats.peak_batch == 3


def test_streams_share_the_batch():
    engine, _ = engine_on_paper()
    params = SamplingParams(max_tokens=6)
    one, two = engine.stream([1, 2, 3], params), engine.stream([4, 5], params)
    got = [(a.token_id, b.token_id) for a, b in zip(one, two, strict=True)]
    assert [a for a, _ in got] == continuation([1, 2, 3], 6)
    assert [b for _, b in got] == continuation([4, 5], 6)
    assert engine.stats.decode_tokens > engine.stats.decode_steps


def test_closing_a_stream_frees_its_pages():
    engine, model = engine_on_paper()
    stream = engine.stream([1, 2, 3], SamplingParams(max_tokens=30))
    assert [next(stream).token_id for _ in range(3)] == continuation([1, 2, 3], 3)
    stream.close()
    assert model.cache == {}


def test_a_session_computes_only_what_is_new():
    engine, _ = engine_on_paper(pages=30)
    session = engine.session()
    params = SamplingParams(max_tokens=4)
    prompt = list(range(10))
    answer = [d.token_id for d in engine.stream(prompt, params, session=session)]
    assert answer == continuation(prompt, 4)
    done = engine.stats.prefill_tokens
    turn = [*prompt, *answer, 30, 31, 32]
    assert [d.token_id for d in engine.stream(turn, params, session=session)] == continuation(
        turn, 4
    )
    # The three new tokens, and the last of the answer, which was sampled but never appended.
    assert engine.stats.prefill_tokens - done == 4
    # Going back to an earlier point forgets what came after it.
    back = [*prompt, 40]
    assert [d.token_id for d in engine.stream(back, params, session=session)] == continuation(
        back, 4
    )
    session.reset()
    assert engine.stats.free_pages == 30


def test_idle_sessions_give_way_and_come_back():
    engine, model = engine_on_paper(pages=8, page_size=4)
    params = SamplingParams(max_tokens=4)
    session = engine.session()
    first = [d.token_id for d in engine.stream([1] * 12, params, session=session)]
    assert session.cached_tokens == 15
    others = [[i] * 20 for i in range(3)]
    answers = engine.generate(others, params)
    assert [list(a.token_ids) for a in answers] == [continuation(p, 4) for p in others]
    assert session.cached_tokens == 0
    assert model.cache == {}
    turn = [1] * 12 + first + [2]
    got = [d.token_id for d in engine.stream(turn, params, session=session)]
    assert got == continuation(turn, 4)


def test_more_sessions_than_slots():
    engine, _ = engine_on_paper(pages=100, max_batch=2)
    params = SamplingParams(max_tokens=2)
    sessions = [engine.session() for _ in range(5)]
    history = [[i] for i in range(5)]
    for _ in range(3):
        for session, tokens in zip(sessions, history, strict=True):
            got = [d.token_id for d in engine.stream(tokens, params, session=session)]
            assert got == continuation(tokens, 2)
            tokens += [*got, 9]


def test_a_session_answers_one_question_at_a_time():
    engine, _ = engine_on_paper()
    session = engine.session()
    stream = engine.stream([1], session=session)
    with pytest.raises(UserError, match="still answering"):
        engine.stream([1, 2], session=session)
    with pytest.raises(UserError, match="still answering"):
        session.reset()
    next(stream)
    stream.close()
    session.reset()


def test_an_interrupted_step_is_computed_again():
    engine, model = engine_on_paper()
    params = SamplingParams(max_tokens=8)
    one, two = engine.stream([1, 2, 3], params), engine.stream([4], params)
    got = [next(one).token_id, next(one).token_id]
    model.fail_next = True
    with pytest.raises(RuntimeError, match="half way"):
        for _ in range(9):
            engine.step()
    assert model.cache == {}
    got += [delta.token_id for delta in one]
    assert got == continuation([1, 2, 3], 8)
    assert [delta.token_id for delta in two] == continuation([4], 8)


def test_end_of_sequence_tokens_end_the_answer():
    plain = continuation([5, 6], 20)
    eos = plain[7]
    engine, _ = engine_on_paper(generation=Generation(eos_token_ids=(eos,)))
    params = SamplingParams(max_tokens=20)
    (answer,) = engine.generate([[5, 6]], params)
    assert list(answer.token_ids) == plain[: plain.index(eos) + 1]
    assert answer.finish_reason == "stop"
    (answer,) = engine.generate([[5, 6]], SamplingParams(max_tokens=20, ignore_eos=True))
    assert list(answer.token_ids) == plain


def test_sampling_depends_on_the_seed_and_not_on_the_batch():
    engine, _ = engine_on_paper(pages=12)
    params = [SamplingParams(max_tokens=6, temperature=1.0, seed=i % 3) for i in range(9)]
    together = engine.generate([[1, 2]] * 9, params)
    alone = [engine.generate([[1, 2]], p)[0] for p in params]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert together[0].token_ids != together[1].token_ids


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "The prompt is empty"),
        (list(range(40)), r"40 tokens, but at most 31 fit \(a KV pool of 32 tokens"),
        ([1, 50], "token id 50, but ids are 0 to 49"),
        ("words", "without a tokenizer"),
    ],
)
def test_prompts_that_can_never_run_are_refused(prompt, sentence):
    engine, model = engine_on_paper(pages=8)
    with pytest.raises(UserError, match=sentence):
        engine.generate([prompt])
    with pytest.raises(UserError, match=f"Prompt 2 of 2: .*{sentence}"):
        engine.generate([[1], prompt])
    assert model.cache == {}


def test_a_prompt_longer_than_the_context_is_refused():
    engine, _ = engine_on_paper(pages=100)
    with pytest.raises(UserError, match=r"64 tokens, but at most 63 fit \(a context of 64"):
        engine.stream([1] * 64)
    (answer,) = engine.generate([[1] * 63])
    assert answer.finish_reason == "context"
    assert len(answer.token_ids) == 1


def test_parameters_must_match_the_prompts():
    engine, _ = engine_on_paper()
    with pytest.raises(UserError, match="1 sampling parameters were given for 2 prompts"):
        engine.generate([[1], [2]], [SamplingParams()])
