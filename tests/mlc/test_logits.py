"""Models compiled by mlc_llm: the same logits over our cache as over TVM's, call by call."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from engine import VOCABULARY, Array, Engine
from engine_scripts import (
    SCRIPTS,
    Script,
    logits,
    recurrent,
    shorter_than_windows,
    windows_slide,
)
from models import compile_model

TOLERANCE = 1e-4
FAMILIES = ["llama", pytest.param("qwen3", marks=pytest.mark.heavy)]


def compare(ours: list[Array], theirs: list[Array]) -> None:
    assert len(ours) == len(theirs) > 0
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.shape == other.shape
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, other, atol=TOLERANCE, err_msg=f"step {step}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_same_logits_over_either_cache(family: str, script: Script) -> None:
    ours = logits(compile_model(family), script)
    compare(ours, logits(compile_model(family, cache="tvm"), script))


def paths(tree: list[int]) -> Iterator[list[int]]:
    """Of every node: the nodes from the root to it."""
    for node in range(len(tree)):
        path: list[int] = []
        while node >= 0:
            path.insert(0, node)
            node = tree[node]
        yield path


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_give_each_node_the_logits_of_its_path(family: str) -> None:
    """TVM's cache has no tree attention on a CPU that runs: there each path is a fork's chain."""
    rng = np.random.default_rng(0)
    ours = Engine(compile_model(family))
    theirs = Engine(compile_model(family, cache="tvm"))
    prompts = {seq_id: rng.integers(0, VOCABULARY, 20 + seq_id).tolist() for seq_id in range(2)}
    for engine in (ours, theirs):
        for seq_id in prompts:
            engine.add(seq_id)
        engine.prefill(prompts)
    trees = [[-1, 0, 0, 1, 1, 2], [-1, 0, -1, 1]]
    for leaves in ((3, 2), (5, 0), (0, 3)):
        tokens = [rng.integers(0, VOCABULARY, len(tree)).tolist() for tree in trees]
        found = ours.verify(dict(enumerate(tokens)), trees)
        ours.commit([0, 1], leaves)
        at = 0
        for seq_id, tree in enumerate(trees):
            for path in paths(tree):
                theirs.fork(seq_id, 9)
                chain = [tokens[seq_id][node] for node in path]
                expected = theirs.prefill({9: chain})
                theirs.remove(9)
                np.testing.assert_allclose(found[at + path[-1]], expected[0], atol=TOLERANCE)
                if path[-1] == leaves[seq_id]:
                    kept = chain
            theirs.prefill({seq_id: kept})
            at += len(tree)
    compare([ours.decode({0: 5, 1: 6})], [theirs.decode({0: 5, 1: 6})])


def test_windows_slide_alike_over_either_cache() -> None:
    """Mistral: sequences slide, with a sink."""
    ours = logits(compile_model("mistral"), windows_slide)
    compare(ours, logits(compile_model("mistral", cache="tvm"), windows_slide))


def test_layers_with_windows() -> None:
    """Gemma 3: up to the window as TVM's cache without windows; beyond it, in whatever steps."""
    library = compile_model("gemma3")
    ours = logits(library, shorter_than_windows)
    plain = Engine(compile_model("gemma3", cache="tvm"), window=0)
    compare(ours, logits(plain, shorter_than_windows))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, 60).tolist()
    found = []
    for steps in ((60,), (31, 29), (23, 1, 30, 1, 5), (1,) * 60):
        engine = Engine(library)
        engine.add(0)
        at = 0
        for step in steps:
            last = engine.prefill({0: tokens[at : at + step]})
            at += step
        found.append(last)
    compare(found, found[:1] * len(found))
    plain.add(9)
    assert np.abs(plain.prefill({9: tokens}) - found[0]).max() > 10 * TOLERANCE


def test_beside_a_recurrent_state() -> None:
    """Qwen3.5, a hybrid: of its layers some have a cache, others a state that is rolled along."""
    ours = logits(compile_model("qwen3_5"), recurrent)
    compare(ours, logits(compile_model("qwen3_5", cache="tvm"), recurrent))


def test_latent_attention_expanded_and_absorbed_agree() -> None:
    """DeepSeek-V2. TVM's cache has no latent attention on a CPU, but the model has two forms of it:
    a prompt's keys and values are expanded, a decoding step's query is absorbed instead."""
    library = compile_model("deepseek_v2")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, 45).tolist()
    whole, chunks, steps = Engine(library), Engine(library), Engine(library)
    for engine in (whole, chunks, steps):
        engine.add(0)
    chunks.prefill({0: tokens[:17]})
    steps.prefill({0: tokens[:1]})
    for length in range(2, 46):
        last = steps.decode({0: tokens[length - 1]})
        if length in (2, 17, 33, 45):
            whole.add(length)
            compare([last], [whole.prefill({length: tokens[:length]})])
    compare([chunks.prefill({0: tokens[17:45]}, extend=True)], [last])
    # Forks, rollback and a batch, against whole prompts.
    steps.fork(0, 1, 20)
    steps.fork(0, 2)
    steps.pop(2, 5)
    found = steps.prefill({1: tokens[:6], 2: tokens[7:9], 0: tokens[:1]}, extend=True)
    prompts = {
        1: tokens[:20] + tokens[:6],
        2: tokens[:40] + tokens[7:9],
        0: tokens + tokens[:1],
    }
    for row, (seq_id, prompt) in zip(found, prompts.items(), strict=True):
        whole.add(100 + seq_id)
        compare([row[None]], [whole.prefill({100 + seq_id: prompt})])
    for seq_id, token in ((0, 3), (1, 4), (2, 5)):
        # One by one: the model's batch_decode rotates every sequence as the first one.
        whole.add(200 + seq_id)
        expected = whole.prefill({200 + seq_id: [*prompts[seq_id], token]})
        compare([steps.decode({seq_id: token})], [expected])


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_latent_attention_of_a_real_width() -> None:
    """Heads and latents as DeepSeek-V2 has them, in float16, of which TVM's schedule for products
    by a matrix of each head took more minutes than anyone waits for."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    sizes |= {"hidden_size": 256, "v_head_dim": 128}
    library = compile_model("deepseek_v2", "q0f16", overrides=tuple(sizes.items()))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 30).tolist()
    whole, steps = Engine(library), Engine(library)
    whole.add(0)
    steps.add(0)
    steps.prefill({0: tokens[:10]})
    for token in tokens[10:]:
        absorbed = steps.decode({0: token})
    expanded = whole.prefill({0: tokens})
    apart = np.sqrt(np.mean((absorbed - expanded) ** 2)) / expanded.std()
    assert apart < 1.5e-2, apart  # as test_quantizations.py has it for float16
