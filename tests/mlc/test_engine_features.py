"""What MLC's engine does to the cache for each of its features, replayed call by call.

Sequences of calls as in cpp/serve (prefix_cache.cc, engine_actions/*.cc): what a feature ends with
must give the logits of the same tokens in a sequence of their own.
"""

from __future__ import annotations

import pytest
from alone import check, tokens
from engine import VOCABULARY, Engine
from models import compile_model


@pytest.fixture
def engine() -> Engine:
    return Engine(compile_model("llama"))


def test_prefix_cache(engine: Engine) -> None:
    """A request forks from a live one or reuses one that ended; others are evicted."""
    first = tokens(40)
    engine.add(0)
    engine.prefill({0: first})
    # Another request shares 25 tokens: fork at that position, prefill the rest.
    second = first[:25] + tokens(9, 1)
    engine.fork(0, 1, 25)
    check(engine.prefill({1: second[25:]}), second)
    # The first ended and is kept; a third continues it, after rolling its tail back.
    third = first[:33] + tokens(5, 2)
    engine.pop(0, 7)
    check(engine.prefill({0: third[33:]}), third)
    free = int(engine.call("attention_kv_cache_get_num_available_pages"))
    engine.remove(1)
    assert int(engine.call("attention_kv_cache_get_num_available_pages")) > free
    check(engine.decode({0: 3}), [*third, 3])
    engine.call("kv_state_clear")
    assert int(engine.call("attention_kv_cache_get_total_sequence_length")) == 0


def test_chunked_prefill_beside_decoding(engine: Engine) -> None:
    """Split prefill: chunks of a long prompt alternate with decoding steps of another request."""
    long, short = tokens(150), tokens(12, 1)
    engine.add(0)
    engine.add(1)
    engine.prefill({1: short})
    for begin in range(0, 150, 60):
        last = engine.prefill({0: long[begin : begin + 60]})
        short.append(7 + begin % 50)
        decoded = engine.decode({1: short[-1]})
    check(last, long)
    check(decoded, short)


def test_parallel_generation(engine: Engine) -> None:
    """n = 8: the prompt is computed once, its children are forked and decode as a batch."""
    prompt = tokens(37)
    engine.add(0)
    engine.prefill({0: prompt})
    for child in range(1, 8):
        engine.fork(0, child)
    histories = [[*prompt] for _ in range(8)]
    for step in range(3):
        for child, history in enumerate(histories):
            history.append((11 * child + step) % VOCABULARY)
        found = engine.decode({child: history[-1] for child, history in enumerate(histories)})
    for row, history in zip(found, histories, strict=True):
        check(row, history)


def test_a_conversation_of_several_turns(engine: Engine) -> None:
    """The next turn forks from the kept sequence of the last, whose own id is then removed."""
    history = tokens(20)
    engine.add(0)
    engine.prefill({0: history})
    for turn in range(1, 4):
        for _ in range(4):
            history.append((turn * 13) % VOCABULARY)
            engine.decode({turn - 1: history[-1]})
        engine.fork(turn - 1, turn)
        engine.remove(turn - 1)
        question = tokens(10, turn)
        history += question
        last = engine.prefill({turn: question})
    check(last, history)


def test_a_small_draft_model_is_verified(engine: Engine) -> None:
    """Drafts are a chain without a tree; what the target rejects is popped from both models."""
    draft = Engine(compile_model("llama"))
    history = tokens(15)
    for model in (engine, draft):
        model.add(0)
        model.prefill({0: history})
    for accepted in (0, 2, 4):
        proposal = [5, 6, 7, 8]
        for token in proposal:
            draft.decode({0: token})
        found = engine.verify({0: proposal})
        engine.pop(0, 4 - accepted)
        draft.pop(0, 4 - accepted)
        history += proposal[:accepted]
        if accepted:
            check(found[accepted - 1], history)
    check(engine.decode({0: 9}), [*history, 9])


def test_a_tree_of_drafts_is_verified(engine: Engine) -> None:
    """EAGLE and Medusa: a tree a sequence, the accepted leaf is committed, -1 accepts none."""
    histories = [tokens(15), tokens(22, 1)]
    for seq_id, history in enumerate(histories):
        engine.add(seq_id)
        engine.prefill({seq_id: history})
    tree = [-1, 0, 0, 1, 2, 2]
    for leaves in ((4, 1), (-1, 0), (5, 5)):
        drafts = [tokens(6, 7), tokens(6, 8)]
        found = engine.verify(dict(enumerate(drafts)), [tree, tree])
        engine.commit([0, 1], leaves)
        for seq_id, leaf in enumerate(leaves):
            path, node = [], leaf
            while node >= 0:
                path.insert(0, drafts[seq_id][node])
                node = tree[node]
            histories[seq_id] += path
            if leaf >= 0:
                check(found[6 * seq_id + leaf], histories[seq_id])
    found = engine.decode({0: 1, 1: 2})
    check(found[0], [*histories[0], 1])
    check(found[1], [*histories[1], 2])


def test_a_grammar_rolls_forced_tokens_back(engine: Engine) -> None:
    """Jump-forward decoding: retokenised text replaces tokens that were computed already."""
    history = tokens(18)
    engine.add(0)
    engine.prefill({0: history})
    engine.decode({0: 3})
    engine.pop(0, 1 + 2)
    forced = tokens(5, 3)
    history = history[:-2] + forced
    check(engine.prefill({0: forced}), history)
