"""``tvm-flashinfer mlc`` as a user meets it when something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import config
from story_model import CHECKPOINT


def mlc(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tvm_flashinfer", "mlc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config("llama")))
    return str(path)


def test_what_the_cache_cannot_do_is_a_sentence(model: str) -> None:
    compile_it = ["compile", model, "--model-type", "llama", "--quantization", "q0f32"]
    done = mlc(*compile_it, "--device", "nvidia/nvidia-h100", "-o", f"{model}.so")
    assert done.returncode == 2
    assert "error: the model's KV cache can't be replaced by tvm_flashinfer's" in done.stderr
    assert "q_dtype is 'float32', CUDA kernels take float16 or bfloat16" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failure_of_mlc_llm_is_shown_as_its_own(model: str) -> None:
    shared = ["compile", model, "--model-type", "llama", "--device", "llvm", "-o", f"{model}.so"]
    done = mlc(*shared, "--quantization", "q5f16")
    assert done.returncode == 2 and "invalid choice: 'q5f16'" in done.stderr
    Path(model).write_text("{}")
    done = mlc(*shared, "--quantization", "q0f32")
    assert done.returncode == 1
    assert "TypeError" in done.stderr and "tvm-flashinfer's" not in done.stderr


def test_what_needs_their_library_says_so(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling and converting don't: see test_without_their_library."""
    monkeypatch.setenv("MLC_LIBRARY_PATH", str(Path(model).parent))
    for command in ("chat", "gen_config"):
        done = mlc(command, model)
        assert done.returncode == 2
        assert f"error: mlc_llm {command} needs libmlc_llm_module.so" in done.stderr


def test_without_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are converted; mlc_llm looks for devices in a process that is bridged as well."""
    monkeypatch.setenv("MLC_LIBRARY_PATH", str(tmp_path))
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    shared = ["--model-type", "llama", "--quantization", "q4f32_1", "-o", str(tmp_path / "model")]
    done = mlc("convert_weight", str(checkpoint), "--device", "cpu", *shared)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "params_shard_0.bin").is_file()
