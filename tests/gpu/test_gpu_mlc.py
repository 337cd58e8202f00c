# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""What ``tvm-flashinfer mlc compile`` made (mlc_models.py), on a real device with TVM's runtime
alone: driven as MLC's engine does it, against the CPU build of the same quantisation, and decoding
steps as graphs, against eager ones bit for bit."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.runtime import load
from modules import FOLDER

sys.path.append(str(Path(__file__).resolve().parents[1] / "mlc"))

import engine_scripts as scripts
from engine import VOCABULARY, Engine, random_weight

MODELS = FOLDER / "mlc"
pytestmark = pytest.mark.skipif(
    not (MODELS / "llama.so").is_file(), reason="no models of MLC: tests/gpu/mlc_models.py"
)
#: Of the largest logit; both sides keep weights and activations in float16.
TOLERANCE = 2e-2


def engine(name: str, **bounds: int) -> Engine:
    return Engine(MODELS / f"{name}.so", load().cuda(0), **bounds)


def references() -> list[tuple[str, str]]:
    """Every model and script that has one."""
    found = []
    for file in sorted(MODELS.glob("*.npz")):
        with np.load(file) as steps:
            names = dict.fromkeys(key.partition("/")[0] for key in steps if "/" in key)
        found += [(file.stem, name) for name in names]
    return found


def close(found: Any, expected: Any) -> None:
    error = np.abs(found.astype("float64") - expected).max()
    assert error < TOLERANCE * np.abs(expected).max()  # NaN fails


@pytest.mark.parametrize(("model", "script"), references())
def test_logits_are_those_of_the_cpu(model: str, script: str) -> None:
    found = scripts.logits(engine(model), getattr(scripts, script))
    with np.load(MODELS / f"{model}.npz") as steps:
        expected = [steps[f"{script}/{n}"] for n in range(len(found))]
        assert f"{script}/{len(found)}" not in steps
    for got, want in zip(found, expected, strict=True):
        close(got, want)


@pytest.mark.parametrize("family", [f for f in ("bert", "llava") if (MODELS / f"{f}.so").is_file()])
def test_encoders(family: str) -> None:
    tvm = load()
    from tvm.runtime.vm import VirtualMachine

    vm = VirtualMachine(tvm.runtime.load_module(str(MODELS / f"{family}.so")), tvm.cuda(0))
    weights = [random_weight(param) for param in json.loads(vm["_metadata"]())["params"]]
    params = [tvm.runtime.tensor(weight, tvm.cuda(0)) for weight in weights]
    with np.load(MODELS / f"{family}.npz") as data:
        expected = data["out"]
        inputs = [data[f"in{n}"] for n in range(len(data.files) - 1)]
    function = {"bert": "prefill", "llava": "image_embed"}[family]
    arguments = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in inputs]
    found = vm[function](*arguments, params).numpy()
    if family == "bert":  # what padding holds is nobody's
        seen = inputs[1].astype(bool)
        found, expected = found[seen], expected[seen]
    close(found, expected)


def calls_of_cuda(run: Callable[[], Any]) -> Counter[str]:
    """How often `run` called what of CUDA's runtime and driver."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return Counter({row.key: row.count for row in trace.key_averages() if row.key[:2] == "cu"})


def kernels_launched(calls: Counter[str]) -> int:
    return sum(count for name, count in calls.items() if "LaunchKernel" in name)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoding_step_is_one_graph(batch: int) -> None:
    """The first step captures, those after it replay; outside of the graph there are `embed`,
    which the engine calls by itself, and nothing of the model."""
    found = {}
    for name in ("llama", "llama_eager"):
        made = engine(name)
        rng = np.random.default_rng(0)
        for seq_id in range(batch):
            made.add(seq_id)
            made.prefill({seq_id: rng.integers(0, VOCABULARY, 14 + seq_id).tolist()})

        def step(made: Engine = made, rng: Any = rng) -> None:
            made.decode(dict(enumerate(rng.integers(0, VOCABULARY, batch).tolist())))

        found[name] = [calls_of_cuda(step) for _ in range(6)]  # over a page boundary
    eager, (first, *later) = found["llama_eager"], found["llama"]
    assert not any("Graph" in name for calls in eager for name in calls)
    assert any("Capture" in name or "Instantiate" in name for name in first)
    for calls, own in zip(later, eager[1:], strict=True):
        assert calls["cudaGraphLaunch"] == 1
        assert not any("Capture" in name or "Instantiate" in name for name in calls)
        assert kernels_launched(calls) <= 2 < 10 < kernels_launched(own)


def test_replays_equal_eager_steps() -> None:
    """300 steps; sequences come, grow and go, in batches of every size."""
    captured, eager = (engine(name, total=8 * 512) for name in ("llama", "llama_eager"))
    rng = np.random.default_rng(1)
    alive: dict[int, int] = {}
    for next_id in range(300):
        if not alive or (len(alive) < 8 and rng.random() < 0.2):
            prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, 60))).tolist()
            outs = []
            for made in (captured, eager):
                made.add(next_id)
                outs.append(made.prefill({next_id: prompt}))
            alive[next_id] = len(prompt)
        elif rng.random() < 0.1 or max(alive.values()) > 500:
            gone = max(alive, key=alive.__getitem__)
            del alive[gone]
            for made in (captured, eager):
                made.remove(gone)
            continue
        else:
            order = rng.permutation(list(alive)).tolist()
            tokens = dict(zip(order, rng.integers(0, VOCABULARY, len(order)).tolist(), strict=True))
            outs = [made.decode(tokens) for made in (captured, eager)]
            alive = {seq_id: length + 1 for seq_id, length in alive.items()}
        assert np.isfinite(outs[0]).all()
        np.testing.assert_array_equal(*outs)
