"""A compiled model in a process that has never heard of our Python package, as MLC's engine's."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import compile_model

from tvm_flashinfer import _library

with contextlib.suppress(ImportError):
    from story_model import library, model_folder

RUN = """
import json, sys
import numpy as np, tvm
from tvm.runtime.vm import VirtualMachine

vm = VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
put = tvm.runtime.tensor
params = [
    put(np.full([128 if n in (-1, "vocab_size") else n for n in p["shape"]], 0.1, p["dtype"]))
    for p in json.loads(vm["_metadata"]())["params"]
]
if sys.argv[2] == "bert":
    ids = put(np.ones((2, 30), "int32"))  # more rows than BLAS is not asked for
    out = vm["prefill"](ids, ids, params).numpy()
else:
    one = tvm.get_global_func("vm.builtin.kv_state_add_sequence")
    sizes = [tvm.runtime.ShapeTuple([n]) for n in (2, 64, 16, 16, 0)]
    one(vm["create_flashinfer_paged_kv_cache"](*sizes), 0)
    out = vm["embed"](put(np.ones(3, "int32")), params).numpy()
assert np.isfinite(out).all()
assert not any(name.split(".")[0] in ("tvm_flashinfer", "mlc_llm") for name in sys.modules)
"""

#: MLC's engine in C++, as its applications for phones drive it: with nothing of its Python either.
ENGINE = """
import ctypes, json, queue, sys, threading
import tvm

ctypes.CDLL(sys.argv[3])
engine = tvm.get_global_func("mlc.json_ffi.CreateJSONFFIEngine")()
loops = [
    threading.Thread(target=engine[name], daemon=True)
    for name in ("run_background_loop", "run_background_stream_back_loop")
]
for loop in loops:
    loop.start()
said = queue.Queue()
engine["init_background_engine"](1, 0, said.put)  # a CPU
config = {"model": sys.argv[2], "model_lib": sys.argv[1], "mode": "local"}
sizes = {"max_num_sequence": 4, "max_total_sequence_length": 1024, "prefill_chunk_size": 512}
engine["reload"](json.dumps(config | sizes | {"additional_models": []}))
messages = [{"role": "user", "content": "Who are you?"}]
request = {"messages": messages, "temperature": 0, "max_tokens": 60, "stream": True}
assert engine["chat_completion"](json.dumps(request), "one"), engine["get_last_error"]()
text, ended = "", False
while not ended:
    for part in json.loads(said.get(timeout=60)):
        ended |= part.get("usage") is not None
        text += "".join(choice["delta"].get("content") or "" for choice in part["choices"])
engine["exit_background_loop"]()
for loop in loops:
    loop.join()
assert not any(name.split(".")[0] in ("tvm_flashinfer", "mlc_llm") for name in sys.modules)
print(text)
"""


def run(family: str, library: Path, named: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TVM_FLASHINFER_LIBRARY"}
    if named is not None:
        env["TVM_FLASHINFER_LIBRARY"] = named
    command = [sys.executable, "-c", RUN, str(library), family]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_engine_answers() -> None:
    from tvm_flashinfer.mlc.bridges import library_file

    engine = library_file()
    if engine is None:
        pytest.skip("mlc_llm's C++ library (libmlc_llm_module.so) isn't there")
    command = [sys.executable, "-c", ENGINE, str(library("ours")), str(model_folder()), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.stdout.strip() == "I am a storyteller.", done.stderr


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_loads_our_library(family: str, tmp_path: Path) -> None:
    """Where it was at compile time; beside the model; where it is named."""
    model = compile_model(family)
    ours = _library.library_path()
    found = run(family, model)
    assert found.returncode == 0, found.stderr
    moved = Path(shutil.copy(model, tmp_path))
    shutil.copy(ours, tmp_path)
    found = run(family, moved)
    assert found.returncode == 0, found.stderr
    found = run(family, model, str(ours))
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_where_our_library_is_missing_a_sentence_says_what_to_do(
    family: str, tmp_path: Path
) -> None:
    found = run(family, compile_model(family), str(tmp_path / "gone.so"))
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert "this model was compiled with tvm-flashinfer and calls tvm_flashinfer." in last
    assert "put the file beside the model's library, or name it in TVM_FLASHINFER_LIBRARY" in last
    assert "gone.so" in last
