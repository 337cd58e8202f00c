"""Modules are read as TVM prints them, or made by a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tvm
from graphs import SEQ, build, causal_attention, qkv
from tvm_ffi import structural_equal

from relax_passes.explain import inspect_module
from relax_passes.module_file import ModuleError, load_module

SCRIPT = """
import numpy as np
import tvm
from neighbour import LENGTH
from tvm import relax

print("this is no part of a report")
builder = relax.BlockBuilder()
q, k, v = (relax.Var(n, relax.TensorType((1, 2, LENGTH, 8), "float32")) for n in "qkv")
with builder.function("main", [q, k, v]):
    x = builder.emit(relax.op.matmul(q, relax.op.permute_dims(k, [0, 1, 3, 2])))
    bias = relax.const(np.arange(LENGTH * LENGTH, dtype="float32").reshape(LENGTH, LENGTH))
    weights = builder.emit(relax.op.nn.softmax(relax.op.add(x, bias)))
    builder.emit_func_output(builder.emit(relax.op.matmul(weights, v)))
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "module.py"
    path.write_text(text)
    return path


def test_printed_module(tmp_path: Path) -> None:
    """A symbolic length, `arange` and an infinity, which TVM's parser refuses as it is printed."""
    mod = tvm.IRModule({"main": build(causal_attention, *qkv(SEQ))})
    text = mod.script()
    for part in ("TypeVar(", "R.arange(0, seq_len", 'R.const("-inf"'):
        assert part in text
    read = load_module(written(tmp_path, text))
    assert structural_equal(read, mod)
    assert [site.mask for site in inspect_module(read).sites] == ["causal"]


@pytest.mark.parametrize(
    "end", ["mod = builder.get()", "made = builder.get()"], ids=["mod", "the only one"]
)
def test_script_that_makes_a_module(
    end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "neighbour.py").write_text("LENGTH = 6\n")
    mod = load_module(written(tmp_path, SCRIPT + end))
    assert [site.variant for site in inspect_module(mod).sites] == ["softmax+bias"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mod = 1", "leaves no module in 'mod', and of its other variables none is."),
        (
            "import tvm\na = b = tvm.IRModule()",
            "leaves no module in 'mod', and of its other variables 2 are: a, b.",
        ),
        ("1 / 0", "can't be read as a module: division by zero."),
        ("mod = (", "can't be read as a module: '(' was never closed"),
        (
            "@I.ir_module\nclass Module:\n    x = metadata['ir.GenericConst'][0]".replace("'", '"'),
            "has constants whose values TVMScript leaves out",
        ),
    ],
    ids=["none", "two", "failing", "no Python", "constants"],
)
def test_no_module(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModuleError) as caught:
        load_module(written(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_kind_of_file(tmp_path: Path) -> None:
    path: Any = tmp_path / "module.json"
    with pytest.raises(ModuleError, match=r"accepted are TVMScript and scripts"):
        load_module(path)
