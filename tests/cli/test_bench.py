"""The benchmark harness: its JSON, its table, its charts, and a small run of suite generate."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from rich.console import Console

from tvm_flashinfer.bench import SUITES, Context, Report, Row
from tvm_flashinfer.bench.machine import describe, matmul_rate, read_bandwidth, versions
from tvm_flashinfer.bench.suites import load_suite

ROWS = [
    Row("s", "small", "latency", "ms", "lower", 2.0, 1.0, {"peer": 6.0}, 9),
    Row("s", "large", "latency", "ms", "lower", 8.0, None, {}, 9),
    Row("s", "small", "rate", "tokens/s", "higher", 50.0, 100.0, {"peer": 10.0}, 3),
]


def test_ratios_say_how_many_times_better_ours_is() -> None:
    assert ROWS[0].ratio(6.0) == 3
    assert ROWS[2].ratio(10.0) == 5
    assert ROWS[0].ratio(1.0) == ROWS[2].ratio(100.0) == 0.5


def test_a_report_is_one_object_and_a_table() -> None:
    report = Report(describe(2), versions(), ROWS, {"other": "it isn't installed"})
    value = json.loads(json.dumps(report.as_dict()))
    assert set(value) == {"machine", "versions", "rows", "skipped"}
    keys = ("suite", "case", "metric", "unit", "better", "ours", "floor", "peers", "samples")
    assert tuple(value["rows"][0]) == keys
    assert value["versions"]["apache-tvm"]
    text = io.StringIO()
    report.print(Console(file=text, width=120))
    for part in ("2 ", "1 (50%)", "peer 6 (3.0x)", "peer 10 (5.0x)", "skipped other: it isn't"):
        assert part in text.getvalue()


def test_charts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tvm_flashinfer.bench.plot import draw

    curve = [dataclasses.replace(ROWS[0], along=("requests", n), ours=n) for n in (2, 8, 32)]
    files = draw(Report({}, {}, [*ROWS, *curve]), tmp_path / "plots")
    names = ["s-latency.png", "s-latency-curve.png", "s-rate.png"]
    assert [file.name for file in files] == names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_rates_are_plausible() -> None:
    assert 1e8 < read_bandwidth(1, megabytes=32) < 1e12
    assert 1e8 < matmul_rate(256) < 1e14


def test_every_suite_that_is_listed_exists() -> None:
    for name in SUITES:
        assert callable(load_suite(name).run)


def test_suite_generate_on_a_small_model(tmp_path: Path) -> None:
    from tvm_flashinfer.bench.generate import Shape, run
    from tvm_flashinfer.cli.bench import _compile

    context = dataclasses.replace(small_context(tmp_path), compile=_compile)
    report = context.report
    shape = Shape(
        layers=2,
        hidden=128,
        heads=4,
        kv_heads=2,
        intermediate=192,
        vocab=512,
        context=96,
        prefill=(32, 64),
        peer_prefill_limit=32,
    )
    run(context, shape)
    rows = {(row.case.split(", ")[1], row.metric): row for row in report.rows}
    assert set(rows) == {
        ("prompt 32", "prefill"),
        ("prompt 64", "prefill"),
        ("context 96", "inter-token latency"),
        ("context 96", "attention in a step"),
        ("context 96", "attention's share of a step"),
    }
    for row in report.rows:
        assert row.ours > 0
        assert all(value > 0 for value in row.peers.values())
    assert rows["prompt 32", "prefill"].peers
    assert not rows["prompt 64", "prefill"].peers
    assert len(report.skipped) == 1
    share = rows["context 96", "attention's share of a step"]
    assert 0 < share.ours < 100


def small_context(tmp_path: Path) -> Context:
    return Context(Report({}, {}), lambda stage: None, _never, _never, tmp_path, "cpu", 1)


def _never(*args: object) -> Any:
    raise AssertionError("this suite compiles nothing")


def test_suite_attention_on_small_batches(tmp_path: Path) -> None:
    """Every contender of every kind of case runs, and computes the same."""
    pytest.importorskip("torch")
    from tvm_flashinfer.bench.attention import Batch, Case, run
    from tvm_flashinfer.variants import soft_cap_window

    params = (("window_left", 16), ("cap", 50.0))
    cases = (
        Case("decode", (1, 1), (33, 33)),
        Case("decode zipf", (1, 1), (70, 16), page_size=1),
        Case("append", (5, 3), (37, 19)),
        Case("prefix", (1, 1, 1), (40, 36, 35), prefix=32),
        Case("variant", (16,), (16,), variant=soft_cap_window, params=params),
    )
    context = small_context(tmp_path)
    run(context, cases)
    rows = {row.case: row for row in context.report.rows}
    assert list(rows) == [case.name for case in cases]
    assert all(row.ours > 0 and row.floor and row.peers for row in rows.values())
    assert "tvm-tir" in rows["decode"].peers
    assert "ours, flat" in rows["prefix"].peers
    assert "ours, plain" in rows["variant"].peers

    for case in cases[:4]:
        batch = Batch(case)
        batch.ours()(0)
        got = batch.out.numpy()
        start = 0
        for queries, (k, v) in zip(case.queries, batch.contiguous, strict=True):
            q = batch.q[start : start + queries].numpy()
            keys, values = (x[0].transpose(0, 1).numpy() for x in (k, v))
            visible = np.tri(queries, len(keys), len(keys) - queries, dtype=bool)
            expected, _ = oracle.attend(q, keys, values, 128**-0.5, visible)
            error = abs(got[start : start + queries] - expected).max()
            assert error <= 1e-5 * abs(expected).max(), case.name
            start += queries


def test_suite_schedule(tmp_path: Path) -> None:
    from tvm_flashinfer.bench.schedule import run

    context = dataclasses.replace(small_context(tmp_path), cases="random 16x*")
    run(context)
    plan, share = context.report.rows
    assert plan.ours > 0 and plan.along == ("requests", 16)
    assert all(value > 0 for value in plan.peers.values())
    assert 0 < share.ours < 100 and share.unit == "%"


def test_suite_passes_on_a_tiny_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tvm_flashinfer.bench.passes import run
    from tvm_flashinfer.bench.zoo import Size
    from tvm_flashinfer.cli.bench import _passes

    context = dataclasses.replace(small_context(tmp_path), passes=_passes, cases="vit*")
    run(context, Size())
    assert not context.report.skipped
    metrics = ["latency, our attention", "latency, our attention and linear layers"]
    assert [row.metric for row in context.report.rows] == metrics
    for row in context.report.rows:
        assert set(row.peers) == {"tvm-default", "torch"}
        assert row.ours > 0


def test_suite_kv_cache_on_small_batches(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tvm_flashinfer.bench.kv_cache import run
    from tvm_flashinfer.bench.kv_formats import tree, two_prompts

    context = small_context(tmp_path)
    run(
        context,
        batch=2,
        length=40,
        prompt=64,
        suffix=16,
        children=(3,),
        cycles=20,
        window=32,
        shapes=(tree((1, 32), (2, 16)), two_prompts(32, 2, 16)),
    )
    rows = {(row.case, row.metric): row for row in context.report.rows}
    assert all(row.ours > 0 for row in rows.values())
    beside = {
        ("begin_forward 2x40", "time of begin_forward"): {"tvm"},
        ("step 2x40, 8/2 heads", "attention step"): {"tvm"},
        ("parallel generation, prompt 64, n 3", "attention of 4 layers between tokens"): {
            "ours, flat",
            "tvm",
        },
        ("StreamingLLM 1x32, sink 4", "attention of a token"): {
            "ours, rotated when read",
            "rotated apart",
        },
        ("formats, 2x16 of 1x32", "attention step"): {"flat", "shared"},
        ("formats, 2 x 2x16 of 32, in turns", "chosen over flat"): set(),
        ("formats, the worst", "chosen over flat"): set(),
        ("cycles to 20", "resident memory"): set(),
    }
    for key, peers in beside.items():
        assert set(rows[key].peers) == peers, key


def test_the_peer_computes_what_ours_does() -> None:
    """TVM's own cache, as the suite makes it: the same attention of the same tokens."""
    import tvm

    from tvm_flashinfer.bench.tvm_kv_cache import TVMKVCache
    from tvm_flashinfer.kv_cache import KVCache

    sizes = {
        "num_qo_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "max_batch_size": 3,
        "max_total_seq_len": 256,
        "prefill_chunk_size": 64,
    }
    caches = [KVCache.create(num_layers=1, **sizes), TVMKVCache(**sizes)]
    rng = np.random.default_rng(0)
    outputs: list[list[np.ndarray]] = [[], []]
    for ids, count in (([0], 40), ([1, 2], 1), ([1, 2], 1)):
        qkv = rng.standard_normal((count * len(ids), 48, 128), dtype=np.float32)
        for cache, found in zip(caches, outputs, strict=True):
            if ids == [0]:
                cache.add_sequence(0)
            out = tvm.runtime.empty((len(qkv), 32, 128), "float32")
            with cache.step(ids, [count] * len(ids)):
                cache.attention_fused_qkv(0, tvm.runtime.tensor(qkv), out)
            found.append(out.numpy())
            if ids == [0]:
                cache.fork_sequence(0, 1)
                cache.fork_sequence(0, 2)
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
