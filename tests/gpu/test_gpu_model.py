# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""A whole model on a real device: the KV cache in its memory, linear layers by cuBLASLt, decoding
steps as CUDA graphs; against torch's float32 logits, and captured against eager bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from harness.runtime import Model, Storages, load, saved_params
from modules import FOLDER

MODELS = FOLDER / "models"
pytestmark = pytest.mark.skipif(
    not (MODELS / "tiny.so").is_file(), reason="no compiled models: scripts/gpu_bundle.sh"
)
#: Of the largest logit; fp16 weights and activations against float32.
TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def params() -> list[torch.Tensor]:
    return saved_params(MODELS / "tiny_params.npz")


@pytest.fixture(scope="module")
def captured(params: list[torch.Tensor]) -> Model:
    return Model(MODELS, "tiny", params)


@pytest.fixture(scope="module")
def eager(params: list[torch.Tensor]) -> Model:
    return Model(MODELS, "tiny_eager", params)


@pytest.fixture(scope="module")
def reference() -> tuple[np.ndarray, np.ndarray]:
    with np.load(MODELS / "tiny_reference.npz") as data:
        return data["ids"], data["logits"]


def tokens(ids: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(ids, np.int32)).cuda()


def restart(model: Model, sequences: range) -> None:
    model.state("clear")
    for sequence in sequences:
        model.state("add_sequence", sequence)


def close(logits: torch.Tensor, expected: np.ndarray) -> None:
    got = logits.reshape(expected.shape).cpu().numpy()
    assert np.abs(got - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("which", ["eager", "captured"])
def test_prefill_and_decode(which: str, reference: Any, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    ids, logits = reference
    restart(model, range(1))
    close(model.step("prefill", [0], [100], tokens(ids[:1, :100])), logits[0, 99])
    close(model.step("prefill", [0], [28], tokens(ids[:1, 100:128])), logits[0, 127])
    for position in range(128, 300):
        step = model.step("decode", [0], [1], tokens(ids[:1, position : position + 1]))
        close(step, logits[0, position])


@pytest.mark.parametrize("which", ["eager", "captured"])
def test_batches(which: str, reference: Any, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    ids, logits = reference
    restart(model, range(4))
    lengths = np.array([5, 33, 2, 16])
    ragged = np.concatenate([ids[n, :length] for n, length in enumerate(lengths)])[None]
    last = tokens(np.cumsum(lengths) - 1)
    out = model.step("batch_prefill", [0, 1, 2, 3], lengths.tolist(), tokens(ragged), last)
    close(out, np.stack([logits[n, length - 1] for n, length in enumerate(lengths)]))
    for step in range(40):
        at = lengths + step
        column = np.array([ids[n, at[n]] for n in range(4)])[:, None]
        out = model.step("batch_decode", [0, 1, 2, 3], [1] * 4, tokens(column))
        close(out, np.stack([logits[n, at[n]] for n in range(4)]))


def test_replays_equal_eager_steps(captured: Model, eager: Model) -> None:
    """500 steps; sequences come, grow and go; every batch size has a graph of its own."""
    rng = np.random.default_rng(0)
    for model in (captured, eager):
        restart(model, range(0))
    alive: list[int] = []
    next_id = 0
    for _ in range(500):
        if not alive or (len(alive) < 8 and rng.random() < 0.2):
            count = int(rng.integers(1, 100))
            prompt = tokens(rng.integers(0, 320, (1, count)))
            outs = []
            for model in (captured, eager):
                model.state("add_sequence", next_id)
                outs.append(model.step("prefill", [next_id], [count], prompt))
            assert torch.equal(*outs)
            alive.append(next_id)
            next_id += 1
        elif rng.random() < 0.1:
            gone = alive.pop(int(rng.integers(len(alive))))
            for model in (captured, eager):
                model.state("remove_sequence", gone)
            continue
        order = rng.permutation(alive).tolist()
        column = tokens(rng.integers(0, 320, (len(order), 1)))
        outs = [
            model.step("batch_decode", order, [1] * len(order), column)
            for model in (captured, eager)
        ]
        assert torch.equal(*outs)
        assert torch.isfinite(outs[0]).all()


def padded(rng: np.random.Generator, lengths: list[int], tokens: int) -> list[torch.Tensor]:
    """Token ids with rubbish behind them, and where every sequence's last one is."""
    ids = tokens_of(rng.integers(0, 320, sum(lengths)), tokens)
    return [ids, tokens_at(np.cumsum(lengths) - 1)]


def tokens_of(ids: np.ndarray, padded_to: int) -> torch.Tensor:
    return tokens(np.pad(ids, (0, padded_to - len(ids)), constant_values=7)[None])


def tokens_at(positions: np.ndarray) -> torch.Tensor:
    return tokens(positions)


def test_a_padded_prefill_is_one_graph(captured: Model, eager: Model, reference: Any) -> None:
    """Lengths come and go under one padded length; so do the sequences that they belong to."""
    ids, logits = reference
    restart(captured, range(2))
    for at, (a, b) in (((0, 0), (20, 33)), ((20, 33), (1, 40)), ((21, 73), (50, 1))):
        given = np.concatenate([ids[0, at[0] : at[0] + a], ids[1, at[1] : at[1] + b]])
        operands = tokens_of(given, 64), tokens_at(np.array([a, a + b]) - 1)
        out = captured.step("batch_prefill_padded", [0, 1], [a, b], *operands)
        close(out, np.stack([logits[0, at[0] + a - 1], logits[1, at[1] + b - 1]]))
    rng = np.random.default_rng(1)
    for model in (captured, eager):
        restart(model, range(4))
    for _ in range(60):
        chosen = rng.permutation(4)[: rng.integers(1, 5)].tolist()
        lengths = rng.integers(1, 9, len(chosen)).tolist()
        operands = padded(rng, lengths, 32)
        outs = [
            model.step(name, chosen, lengths, *operands)
            for model, name in ((captured, "batch_prefill_padded"), (eager, "batch_prefill"))
        ]
        assert torch.equal(*outs)
        column = tokens(rng.integers(0, 320, (4, 1)))
        outs = [m.step("batch_decode", [0, 1, 2, 3], [1] * 4, column) for m in (captured, eager)]
        assert torch.equal(*outs)


def test_nothing_stale_is_read(params: list[torch.Tensor], eager: Model) -> None:
    """Between replays the whole model's activations and the cache's workspace become NaN."""
    rng = np.random.default_rng(2)
    with Storages() as storages:
        model = Model(MODELS, "tiny", params)
        restart(model, range(3))
        restart(eager, range(3))
        prompts = [padded(rng, [40, 1, 17], 64) for _ in range(2)]
        columns = [tokens(rng.integers(0, 320, (3, 1))) for _ in range(12)]
        poison = load().get_global_func("tvm_flashinfer.kv_cache_poison_workspace")
        kept: list[torch.Tensor] = []
        steps: list[Any] = [
            *(("batch_prefill_padded", [40, 1, 17], p) for p in prompts),
            *(("batch_decode", [1, 1, 1], [c]) for c in columns),
        ]
        for name, lengths, operands in steps:
            out = model.step(name, [0, 1, 2], lengths, *operands).clone()
            expected = eager.step(name.removesuffix("_padded"), [0, 1, 2], lengths, *operands)
            torch.cuda.synchronize()
            assert torch.isfinite(out).all()
            assert torch.equal(out, expected)
            kept.append(out)
            storages.poison()
            poison(model.cache)
    assert len(storages.taken) > 0
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(kept))


def test_steps_need_no_synchronisation(captured: Model, eager: Model) -> None:
    """1,000 steps back to back, over page boundaries; then the same with a wait after each."""
    ids = torch.randint(0, 320, (1000, 4, 1), dtype=torch.int32, device="cuda")
    outs = []
    for model, wait in ((captured, False), (eager, True)):
        restart(model, range(4))
        for sequence in range(4):
            model.step("prefill", [sequence], [3 + sequence], ids[: 3 + sequence, 0].T.contiguous())
        torch.cuda.synchronize()
        kept = []
        for step in range(1000):
            logits = model.step("batch_decode", [0, 1, 2, 3], [1] * 4, ids[step])
            if wait:
                torch.cuda.synchronize()
            if step % 50 == 49:
                kept.append(logits.clone())
        torch.cuda.synchronize()
        outs.append(torch.stack(kept))
    assert torch.equal(*outs)


def test_caches_share_no_graph(captured: Model, eager: Model) -> None:
    second = captured.new_cache()
    expected = []
    for model, caches in ((captured, (None, second)), (eager, (None,))):
        for n, cache in enumerate(caches if model is captured else (None, None)):
            if cache is None:
                restart(model, range(1))
            else:
                model.state("add_sequence", 0, cache=cache)
            prompt = tokens(np.arange(20 + 7 * n) % 320)[None]
            model.step("prefill", [0], [20 + 7 * n], prompt, cache=cache)
            for token in (3, 5):
                out = model.step("decode", [0], [1], tokens([[token + n]]), cache=cache)
            expected.append(out.clone())
    assert torch.equal(expected[0], expected[2])
    assert torch.equal(expected[1], expected[3])


def test_forks_copy_the_page_they_share(captured: Model, reference: Any) -> None:
    ids, logits = reference
    restart(captured, range(1))
    captured.step("prefill", [0], [40], tokens(ids[:1, :40]))
    captured.state("fork_sequence", 0, 1, 37)  # inside a page
    captured.state("fork_sequence", 0, 2, -1)
    for position in range(40, 60):
        behind = position - 3
        column = tokens([[ids[0, position]], [ids[0, behind]], [ids[0, position]]])
        out = captured.step("batch_decode", [0, 1, 2], [1, 1, 1], column)
        close(out, np.stack([logits[0, position], logits[0, behind], logits[0, position]]))
    captured.state("popn", 0, 15)
    close(captured.step("decode", [0], [1], tokens(ids[:1, 45:46])), logits[0, 45])


def test_token_trees(captured: Model, reference: Any) -> None:
    """Two branches after a prompt; the accepted one goes on as if it had come alone."""
    ids, logits = reference
    restart(captured, range(1))
    captured.step("prefill", [0], [33], tokens(ids[:1, :33]))
    nodes = [ids[0, 33], ids[1, 0], ids[0, 34], ids[1, 1], ids[0, 35]]
    parents = [-1, -1, 0, 1, 2]
    shape = captured.ffi.Shape
    captured.state("begin_forward", shape([0]), shape([5]), shape(parents))
    inputs = [captured.ffi.from_dlpack(tokens(x)) for x in ([nodes], range(5))]
    out = captured.vm["batch_prefill"](*inputs, captured.cache, captured.params)
    captured.state("end_forward")
    got = torch.from_dlpack(out).reshape(5, -1)[[0, 2, 4]]
    close(got, logits[0, 33:36])
    commit = captured.tvm.get_global_func(
        "vm.builtin.attention_kv_cache_commit_accepted_token_tree_nodes"
    )
    commit(captured.cache, shape([0]), shape([4]))
    for position in range(36, 44):
        step = captured.step("decode", [0], [1], tokens(ids[:1, position : position + 1]))
        close(step, logits[0, position])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 64, 200])
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_linear(dtype: torch.dtype, rows: int, layout: str) -> None:
    import tvm_ffi

    tvm = load()
    torch.manual_seed(rows)
    k, n = 256, 136
    x = torch.randn(rows, k, dtype=dtype, device="cuda")
    weight = torch.randn(n, k, dtype=dtype, device="cuda") / 16
    given = weight if layout == "nk" else weight.T.contiguous()
    function = tvm.get_global_func("tvm_flashinfer.linear_cuda" + ("" if layout == "nk" else "_kn"))
    for out_dtype in {dtype, torch.float32}:
        bias = torch.randn(n, dtype=out_dtype, device="cuda")
        for operands in ([x, given], [x, given, bias]):
            out = torch.full((rows, n), float("nan"), dtype=out_dtype, device="cuda")
            torch.cuda.synchronize()
            function(*(tvm_ffi.from_dlpack(t) for t in [*operands, out]))
            torch.cuda.synchronize()
            want = x.double() @ weight.double().T + (bias.double() if len(operands) == 3 else 0)
            error = (out.double() - want).norm() / want.norm()
            assert error < (1e-5 if dtype is torch.float32 else 4e-3)
