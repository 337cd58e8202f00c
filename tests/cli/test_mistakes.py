"""Every mistake of a user's: one sentence on standard error, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tvm
from checkpoints import make_checkpoint
from safetensors.numpy import save_file

from tvm_flashinfer.bench import SUITES
from tvm_flashinfer.cli import main
from tvm_flashinfer.manifest import LIBRARY, MANIFEST, WEIGHTS, Manifest

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; returns what it said, in one line."""

    def run(*argv: object) -> str:
        assert main([str(arg) for arg in argv]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return " ".join(said.split())

    return run


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A compiled directory with a library that is none: enough for what is checked before."""
    directory = tmp_path / "model"
    directory.mkdir()
    Manifest(
        target="llvm",
        device="cpu",
        attention="ours",
        dtype="float32",
        page_size=16,
        max_batch=2,
        max_seq_len=64,
        prefill_chunk_size=64,
        params=("w",),
        model={"vocab_size": 8},
        versions={"tvm": tvm.__version__},
    ).save(directory)
    import numpy as np

    save_file({"w": np.zeros(3, np.float32)}, directory / WEIGHTS)
    (directory / LIBRARY).write_bytes(b"not a library")
    return directory


def change(directory: Path, **fields: object) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compile", "inspect"])
def test_no_such_checkpoint(command: str, refused: Refused, tmp_path: Path) -> None:
    extra = ["-o", tmp_path / "out"] if command == "compile" else []
    said = refused(command, tmp_path / "nowhere", *extra)
    assert "no directory" in said
    assert "nowhere" in said


def test_not_a_checkpoint(refused: Refused, tmp_path: Path) -> None:
    said = refused("compile", tmp_path, "-o", tmp_path / "out")
    assert "is not a checkpoint: it has no config.json" in said
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in refused("compile", file, "-o", tmp_path / "out")


def test_an_unsupported_architecture_names_the_supported_ones(
    refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    said = refused("inspect", tmp_path)
    for family in ("mamba", "llama", "mistral", "qwen2", "qwen3"):
        assert family in said.lower()


def test_corrupt_safetensors(refused: Refused, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "ckpt", tokenizer=False)
    weights = tmp_path / "ckpt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = refused("compile", tmp_path / "ckpt", "-o", tmp_path / "out")
    assert "not a readable safetensors file" in said
    assert not (tmp_path / "out").exists()


def test_an_unknown_target(refused: Refused, tmp_path: Path) -> None:
    said = refused("compile", tmp_path, "-o", tmp_path / "out", "--target", "abacus")
    assert "abacus" in said


def test_no_compiler(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused("compile", tmp_path, "-o", tmp_path / "out")
    assert "no C++ compiler" in said
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX=no-such-compiler" in refused("compile", tmp_path, "-o", tmp_path / "out")


def test_an_output_that_holds_something_else(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert "aren't a compiled model" in refused("compile", tmp_path, "-o", tmp_path)
    said = refused("compile", tmp_path, "-o", tmp_path / "precious.txt")
    assert "is a file" in said
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "options",
    [
        ["--page-size", "0"],
        ["--max-batch", "-1"],
        ["--max-seq-len", "one"],
        ["--dtype", "int4"],
        ["--attention", "theirs"],
    ],
)
def test_options_out_of_range(options: list[str], refused: Refused, tmp_path: Path) -> None:
    assert options[0] in refused("compile", tmp_path, "-o", tmp_path / "out", *options)


# Compiled models --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_no_such_model(command: str, refused: Refused, tmp_path: Path) -> None:
    extra = ["--prompt", "x"] if command == "generate" else []
    assert "doesn't exist" in refused(command, tmp_path / "nowhere", *extra)
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in refused(command, file, *extra)


def test_a_checkpoint_instead_of_a_model(refused: Refused, tmp_path: Path) -> None:
    assert "it has no manifest.json" in refused("chat", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "run `tvm-flashinfer compile` on it first" in refused("chat", tmp_path)


def test_a_library_for_another_tvm(refused: Refused, model_dir: Path) -> None:
    change(model_dir, versions={"tvm": "0.1.2"})
    said = refused("chat", model_dir)
    assert f"was compiled for TVM 0.1.2, but TVM {tvm.__version__} is running" in said


def test_our_library_for_another_tvm(tmp_path: Path, model_dir: Path) -> None:
    """In a process of its own, since a process loads the library only once."""
    from tvm_flashinfer import _library

    source = _library.library_path()
    shutil.copy(source, tmp_path / source.name)
    facts = json.loads(source.with_name("build_info.json").read_text())
    (tmp_path / "build_info.json").write_text(json.dumps({**facts, "tvm_version": "0.1.2"}))
    env = {"TVM_FLASHINFER_LIBRARY": str(tmp_path / source.name)}
    done = command_line("chat", str(model_dir), env=env)
    assert done.returncode == 2
    assert "was compiled for TVM 0.1.2" in done.stderr
    assert "Traceback" not in done.stderr
    done = command_line("doctor", "--json", env=env)
    assert done.returncode == 1
    found = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert found["libtvm_flashinfer.so"]["status"] == "broken"
    assert "0.1.2" in found["libtvm_flashinfer.so"]["advice"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / MANIFEST).write_text("{"), "can't be read"),
        (lambda d: (d / MANIFEST).write_text("[]"), "holds no JSON object"),
        (lambda d: change(d, format=99), "has format 99"),
        (lambda d: change(d, page_size=0), "page_size is 0"),
        (lambda d: change(d, surprise=1), "is damaged"),
        (lambda d: change(d, params=["w", "v"]), "lacks the parameter 'v'"),
        (lambda d: (d / WEIGHTS).write_bytes(b"garbage"), "is corrupt"),
        (lambda d: (d / WEIGHTS).unlink(), "weights.safetensors is missing"),
        (lambda d: (d / LIBRARY).unlink(), "lib.so is missing"),
        (lambda d: None, "lib.so can't be loaded"),
        (lambda d: change(d, device="cuda", target="cuda"), "this machine has no such device"),
    ],
)
def test_damaged_models(
    damage: Callable[[Path], object], sentence: str, refused: Refused, model_dir: Path
) -> None:
    if "no such device" in sentence and tvm.cuda(0).exist:
        sentence = "can't be loaded"
    damage(model_dir)
    assert sentence in refused("generate", model_dir, "--prompt", "x")


def test_prompts_that_do_not_fit(refused: Refused, compiled: Callable[..., Path]) -> None:
    model = compiled("llama")
    said = refused("generate", model, "--prompt", "x" * 300)
    assert "The prompt has 300 tokens, but at most 255 fit (a context of 256 tokens" in said
    said = refused("generate", model, "--prompt", "x" * 100, "--kv-tokens", "64")
    assert "a KV pool of" in said
    said = refused("generate", model, "--prompt", "x", "--prompt", "")
    assert "Prompt 2 of 2: The prompt is empty" in said


def test_generation_options(refused: Refused, compiled: Callable[..., Path]) -> None:
    model = compiled("llama")
    assert "No prompt was given" in refused("generate", model)
    assert "top_p is 3.0" in refused("generate", model, "--prompt", "x", "--top-p", "3")
    assert "--temperature" in refused("generate", model, "--prompt", "x", "--temperature", "-1")
    said = refused("generate", model, "--prompt", "x", "--max-batch", "1000")
    assert "max_batch is 1000, but the model was compiled for 1 to 64" in said
    assert "can't be read" in refused("generate", model, "--prompts-file", "/nowhere/prompts")


# Other commands ---------------------------------------------------------------------------------


def test_unknown_suites_name_those_there_are(refused: Refused, tmp_path: Path) -> None:
    available = ", ".join(SUITES)
    said = refused("bench", "everything")
    assert f"There is no suite 'everything'; available: {available}." in said
    said = refused("bench", "generate", "--json", tmp_path / "no" / "x.json")
    assert "its folder doesn't exist" in said
    assert "No case of suite generate matches 'x'" in refused("bench", "generate", "--cases", "x")
    assert "The device is 'tpu'" in refused("bench", "generate", "--device", "tpu")


def test_unknown_commands_and_no_command(refused: Refused) -> None:
    assert "frobnicate" in refused("frobnicate")
    assert "--output" in refused("compile", "x")


def test_mistakes_of_ours_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tvm_flashinfer.cli.doctor as doctor

    def broken() -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(doctor, "examine", broken)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert "a bug" in said
    assert "a mistake of tvm-flashinfer's" in said


def command_line(
    *argv: str, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "tvm_flashinfer", *argv],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
        check=False,
    )
