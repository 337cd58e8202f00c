"""Prefills of padded length, which a GPU runs as one graph for each: what the engine hands over and
takes back, with a model compiled for this CPU that has them too (there they are run, not captured).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_end_to_end import assert_equal_alone_and_batched, random_prompts, reference

from tvm_flashinfer.engine import Engine
from tvm_flashinfer.engine.model import CompiledModel, padded_length

CHUNK = 160


@pytest.mark.parametrize(
    ("count", "limit", "least", "expected"),
    [
        (1, 2048, 16, 16),
        (16, 2048, 16, 16),
        (17, 2048, 16, 32),
        (127, 2048, 16, 128),
        (128, 2048, 16, 128),
        (129, 2048, 16, 256),
        (300, 2048, 16, 384),
        (2040, 2048, 16, 2048),
        (290, 300, 16, 300),  # never beyond what a step holds
        (300, 300, 16, 300),
        (3, 8, 1, 4),
        (1, 8, 1, 1),
        (5, 6, 1, 6),
        (1, 4, 16, 4),
    ],
)
def test_padded_lengths_are_few(count: int, limit: int, least: int, expected: int) -> None:
    assert padded_length(count, limit, least) == expected


def test_every_length_fits_its_padding() -> None:
    for limit in (1, 7, 128, 200, 2048):
        padded = [padded_length(count, limit) for count in range(1, limit + 1)]
        assert all(count <= up <= limit for count, up in enumerate(padded, 1))
        assert padded == sorted(padded)
        assert len(set(padded)) <= 5 + limit // 128


@pytest.fixture(scope="module")
def padded(checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose prefill has the twin that is captured on a GPU."""
    import tvm

    from relax_passes import fold_layout
    from relax_passes.capture import PrepareCapture
    from tvm_flashinfer.cli.compile import Options, compile_checkpoint

    fold = fold_layout.FoldLayout
    folder = tmp_path_factory.mktemp("padded") / "llama"
    with pytest.MonkeyPatch.context() as patch:
        both: Callable[[], Any] = lambda: tvm.transform.Sequential([fold(), PrepareCapture(())])  # noqa: E731
        patch.setattr(fold_layout, "FoldLayout", both)
        options = Options(max_batch=6, max_seq_len=CHUNK)  # a step holds no more
        compile_checkpoint(checkpoint("llama")[0], folder, options, lambda _: None)
    return folder


def test_the_engine_prefills_padded_as_transformers_does(
    padded: Path, checkpoint: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    engine = Engine.load(padded)
    function = CompiledModel._captured_prefill

    def spy(self: CompiledModel, seq_ids: Any, lengths: Any, ids: Any, wanted: Any) -> Any:
        shapes.append((len(ids), len(wanted)))
        return function(self, seq_ids, lengths, ids, wanted)

    monkeypatch.setattr(CompiledModel, "_captured_prefill", spy)
    # Alone: a padded length exactly, and others. Together: more than a step holds.
    prompts = random_prompts(12, [1, 2, 16, 17, 48, 100])
    want = reference(checkpoint("llama")[1], prompts, 12)
    assert_equal_alone_and_batched(engine, prompts, want, 12)
    assert {count for count, _ in shapes} >= {2, 16, CHUNK}
    assert len({wanted for _, wanted in shapes}) > 1


def test_logits_do_not_depend_on_what_pads_them(padded: Path) -> None:
    rng = np.random.default_rng(0)
    chunks = [rng.integers(1, 60, n).tolist() for n in (5, 1, 23)]
    models = [CompiledModel(padded) for _ in range(2)]
    models[1]._padded_prefill = None
    for wanted in ([0, 1, 2], [2, 0], [1], []):
        outs = []
        for model in models:
            model.clear()
            for seq_id in range(3):
                model.add(seq_id)
            outs.append(model.prefill([0, 1, 2], chunks, wanted))
        assert outs[0].shape == outs[1].shape == (len(wanted), outs[0].shape[1])
        np.testing.assert_allclose(outs[0], outs[1], rtol=1e-4, atol=1e-4)
