"""Options, targets and what a compiled model carries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from checkpoints import make_model
from tvm import relax
from tvm.target import codegen

from relax_passes.importer import ImportedCausalLM, import_causal_lm
from relax_passes.pipeline import (
    PIPELINE_NAME,
    CompiledCausalLM,
    CompileError,
    compile_causal_lm,
    resolve_target,
)


@pytest.fixture(scope="module")
def imported() -> ImportedCausalLM:
    return import_causal_lm(make_model("llama", num_hidden_layers=1))


@pytest.fixture(scope="module")
def compiled(imported: ImportedCausalLM) -> CompiledCausalLM:
    return compile_causal_lm(imported, max_seq_len=64, max_batch=2, page_size=8)


def test_library_carries_its_kernel(
    compiled: CompiledCausalLM, driver: Callable[[Any], Any], tokens: np.ndarray, tmp_path: Path
) -> None:
    run = driver(compiled)
    run.start(0)
    expected = run.run("prefill", [0], [len(tokens)], tokens[None])
    compiled.export_library(tmp_path / "model.so")
    compiled.executable = tvm.runtime.load_module(str(tmp_path / "model.so"))
    again = driver(compiled)
    again.start(0)
    logits = again.run("prefill", [0], [len(tokens)], tokens[None])
    np.testing.assert_array_equal(logits, expected)


def test_metadata(compiled: CompiledCausalLM) -> None:
    data = json.loads(json.dumps(compiled.metadata))
    assert data["param_names"] == list(compiled.params)
    assert (data["num_layers"], data["num_qo_heads"], data["num_kv_heads"]) == (1, 4, 2)
    assert data["kv_bytes_per_token"] == 2 * 2 * 32 * 4
    assert data["target"]["kind"] == "llvm"


def test_report(compiled: CompiledCausalLM) -> None:
    (site,) = compiled.report.sites
    assert site.rewritten
    assert (site.form, site.variant, site.mask, site.reason) == ("G", "softmax", "causal", "")
    assert compiled.report.as_dict()["refusals"] == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attention": "theirs"}, "'ours' and 'tir'"),
        ({"page_size": 0}, "page_size is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_seq_len": 100_000}, "accepted are 1 to 256"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size is 0"),
        ({"target": "no_such_kind"}, "'no_such_kind' is no target"),
        ({"target": "opencl"}, "llvm and cuda targets"),
        ({"target": "cuda -arch=sm_75"}, "expected sm_80 or later"),
        ({"attention": "tir", "page_size": 8}, "accept 16"),
    ],
)
def test_wrong_options(imported: ImportedCausalLM, options: Any, expected: str) -> None:
    with pytest.raises(CompileError, match=expected) as caught:
        compile_causal_lm(imported, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["native", "cpu", "llvm"])
def test_native_target(text: str) -> None:
    target = resolve_target(text)
    assert (target.kind.name, target.attrs["mcpu"]) == ("llvm", codegen.llvm_get_system_cpu())


@pytest.mark.parametrize("text", ["llvm -mcpu=x86-64-v3", '{"kind": "llvm", "mcpu": "x86-64-v3"}'])
def test_target_for_another_cpu(text: str) -> None:
    assert resolve_target(text).attrs["mcpu"] == "x86-64-v3"


def test_target_option_that_is_none() -> None:
    with pytest.raises(CompileError, match="-name=value"):
        resolve_target("llvm mcpu")


def test_pipeline_is_registered(imported: ImportedCausalLM) -> None:
    target = resolve_target("native")
    pipeline = relax.get_pipeline(PIPELINE_NAME, target=target)
    with target:
        module = pipeline(imported.module)
    names = {gv.name_hint for gv in module.functions}
    assert names >= {"prefill", "decode", "batch_prefill", "batch_decode", "create_kv_cache"}
