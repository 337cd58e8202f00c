"""The commands on a tiny model: what they print, and that they work over pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tvm_flashinfer.cli import main
from tvm_flashinfer.engine import Conversation, Engine, SamplingParams
from tvm_flashinfer.manifest import Manifest

Compiled = Callable[..., Path]


def output(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(arg) for arg in argv]) == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--help")
    for command in ("compile", "chat", "generate", "inspect", "doctor", "bench"):
        assert command in text
    assert output(capsys, "--version").startswith("tvm-flashinfer ")


def test_compile_writes_a_directory_that_says_what_it_is(
    capsys: pytest.CaptureFixture[str], checkpoint: Callable, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "model"
    options = ["--page-size", "8", "--max-batch", "2", "--max-seq-len", "128"]
    said = output(capsys, "compile", checkpoint("qwen3")[0], "-o", out, *options)
    assert "3 of 3 attention sites rewritten" in said
    manifest = Manifest.load(out)
    assert (manifest.page_size, manifest.max_batch, manifest.max_seq_len) == (8, 2, 128)
    assert manifest.generation.eos_token_ids == (0,)
    assert manifest.model["num_layers"] == 3
    assert [site["rewritten"] for site in manifest.report["sites"]] == [True] * 3
    # A second compile replaces the first, and leaves nothing else behind.
    output(capsys, "compile", checkpoint("qwen3")[0], "-o", out, "--max-batch", "3")
    assert Manifest.load(out).max_batch == 3
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_a_compiled_model_runs_without_torch_and_compiler(compiled: Compiled) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'relax_passes'):\n"
        "    sys.modules[name] = None\n"
        "from tvm_flashinfer.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    model = compiled("llama")
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", str(model), "--prompt", "abc", "--max-tokens=4"],
        env={**os.environ, "PATH": "/nowhere", "CXX": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (answer,) = Engine.load(model).generate(["abc"], SamplingParams(max_tokens=4))
    assert done.stdout == answer.text + "\n"


def test_generate_json(
    capsys: pytest.CaptureFixture[str], compiled: Compiled, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("two\n\nthree [x]\n")
    options = ["--prompt", "one", "--prompts-file", file, "--max-tokens", "5", "--json"]
    result = json.loads(output(capsys, "generate", compiled("llama"), *options))
    prompts = [c["prompt"] for c in result["completions"]]
    assert prompts == ["one", "two", "three [x]"]
    answers = Engine.load(compiled("llama")).generate(prompts, SamplingParams(max_tokens=5))
    assert [c["token_ids"] for c in result["completions"]] == [list(a.token_ids) for a in answers]
    assert result["stats"]["peak_batch"] == 3
    assert result["stats"]["free_pages"] == result["stats"]["total_pages"]


def test_generate_prints_answers_under_their_prompts(
    capsys: pytest.CaptureFixture[str], compiled: Compiled
) -> None:
    options = ["--prompt", "one", "--prompt", "t[/]o", "--max-tokens", "3"]
    text = output(capsys, "generate", compiled("llama"), *options)
    assert "[1] one\n" in text
    assert "[2] t[/]o\n" in text


def test_seeds_repeat(capsys: pytest.CaptureFixture[str], compiled: Compiled) -> None:
    def draw(seed: int) -> str:
        options = ["--prompt", "x", "--temperature", "2", "--top-p", "0.9", "--seed", seed]
        return output(capsys, "generate", compiled("llama"), *options, "--max-tokens", "8")

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_inspect(capsys: pytest.CaptureFixture[str], checkpoint: Callable) -> None:
    directory = checkpoint("mistral")[0]
    report = json.loads(output(capsys, "inspect", directory, "--json"))
    assert [site["layer"] for site in report["sites"]] == [0, 1, 2]
    for site in report["sites"]:
        assert site["rewritten"]
        assert (site["num_qo_heads"], site["num_kv_heads"], site["head_dim"]) == (4, 2, 32)
    assert "3 of 3 attention sites rewritten" in output(capsys, "inspect", directory)


def test_inspect_explains_and_draws_a_site(
    capsys: pytest.CaptureFixture[str], checkpoint: Callable, tmp_path: Path
) -> None:
    directory, _ = checkpoint("llama")
    picture = tmp_path / "model.svg"
    text = output(capsys, "inspect", directory, "--site", "1", "--svg", picture)
    assert "variant softmax, mask causal" in text
    assert "R.nn.attention" in text
    assert "tvm_flashinfer.graph_attention" in text
    assert "tvm_flashinfer::cpu::Attention<" in text
    assert picture.read_text().lstrip().startswith("<?xml")


def test_inspect_a_module(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "from tvm.script import ir as I\n"
        "from tvm.script import relax as R\n"
        "@I.ir_module\n"
        "class Module:\n"
        "    @R.function\n"
        "    def main(q: R.Tensor((1, 4, 6, 8), 'float32'), k: R.Tensor((1, 4, 8, 6), 'float32'),\n"
        "             v: R.Tensor((1, 4, 6, 8), 'float32')):\n"
        "        weights = R.nn.softmax(R.matmul(q, k), axis=-1)\n"
        "        return R.matmul(weights, v)\n"
    )
    (site,) = json.loads(output(capsys, "inspect", module, "--json"))["sites"]
    assert "no layout that strides describe" in site["reason"]
    assert "left alone" in output(capsys, "inspect", module, "--site", "0")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    found = {f["name"]: f for f in json.loads(output(capsys, "doctor", "--json"))}
    for name in ("TVM", "ABI", "C++ compiler", "CPU features", "BLAS", "kernel cache"):
        assert found[name]["status"] == "ok"
    assert "Everything needed is here." in output(capsys, "doctor")


def test_doctor_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "broken" in said
    assert "unset CXX or name a C++ compiler" in " ".join(said.split())


# Chat -------------------------------------------------------------------------------------------


def chat(model: Path, stdin: str, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tvm_flashinfer", "chat", str(model), *options],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    return done


def test_chat_over_a_pipe_keeps_the_conversation(compiled: Compiled) -> None:
    model = compiled("llama")
    done = chat(model, "hi\nand\n/stats\n/reset\nhi\n/exit\nnot read\n", "--max-tokens", "6")
    conversation = Conversation(engine := Engine.load(model))
    params = SamplingParams(max_tokens=6)
    answers = ["".join(d.text for d in conversation.ask(text, params)) for text in ("hi", "and")]
    lines = done.stdout.split("Statistics")[0]
    assert lines == "".join(answer.lstrip() + "\n" for answer in answers)
    assert done.stdout.rstrip().endswith(answers[0].strip())
    assert f"{conversation.tokens} of 256 tokens" in done.stdout
    # Only what was new was prefilled: the two turns together are the conversation.
    assert engine.stats.prefill_tokens <= conversation.tokens


def test_chat_helps_and_says_when_the_context_is_full(compiled: Compiled) -> None:
    done = chat(compiled("llama"), f"/help\n/frob\n{'x' * 300}\n/exit\n")
    assert "/reset" in done.stdout
    assert "There is no command /frob" in done.stdout
    said = " ".join(done.stderr.split())
    assert "but at most 255 fit" in said
    assert "/reset begins a new conversation." in said


def test_an_answer_may_fill_the_context(compiled: Compiled) -> None:
    engine = Engine.load(compiled("llama"))
    conversation = Conversation(engine)
    params = SamplingParams(max_tokens=1000, ignore_eos=True)
    deltas = list(conversation.ask("x" * 150, params))
    assert deltas[-1].finish_reason == "context"
    assert conversation.tokens == 256
    with pytest.raises(ValueError, match="at most 255 fit"):
        conversation.ask("more", params)
    conversation.reset()
    assert len(list(conversation.ask("again", SamplingParams(max_tokens=3)))) <= 3


def test_ctrl_c_stops_the_answer_and_not_the_program(compiled: Compiled) -> None:
    """Sent while an answer of 200 tokens streams; the next question is still answered."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tvm_flashinfer", "chat", str(compiled("llama"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b"/stats\n/exit\n", timeout=60)
    assert process.returncode == 0, err
    assert b"[stopped]" in out
    assert b"Statistics" in out
    assert b"Traceback" not in err
