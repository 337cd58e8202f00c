"""Suite ``mlc`` of the benchmarks, small."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tvm_flashinfer.bench import Context, Report
from tvm_flashinfer.bench.suites import load_suite


def context(folder: Path) -> Context:
    def unused(*_: object) -> None:
        raise AssertionError

    return Context(Report({}, {}), print, unused, unused, folder, "cpu", os.cpu_count() or 1)


@pytest.mark.heavy
def test_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm_flashinfer.bench import mlc
    from tvm_flashinfer.mlc.bridges import library_file

    monkeypatch.setattr(mlc, "PROMPTS", (3, 90))
    monkeypatch.setattr(mlc, "LIMIT", 200)
    made = context(tmp_path)
    mlc.run(made, mlc.Shape(1, 128, 4, 2, 96, 128, context=256))
    steps = {row.metric: row for row in made.report.rows if row.floor is not None}
    assert set(steps) == {"decoding step", "attention in a step"}
    for row in steps.values():
        assert row.ours > 0 and row.peers["tvm-cache"] > 0
    # Attention is in both: the clock knows the calls of either cache.
    assert steps["attention in a step"].ours < steps["decoding step"].ours
    engine = [row for row in made.report.rows if row.floor is None]
    assert len(engine) == 3 * (library_file() is not None)
    assert bool(made.report.skipped) == (library_file() is None)


def test_without_mlc_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_FLASHINFER_MLC_LLM_PATH", str(tmp_path))
    made = context(tmp_path)
    load_suite("mlc").run(made)
    assert not made.report.rows
    assert "holds no package mlc_llm" in made.report.skipped["mlc"]
