"""The example checkpoint as a model of MLC's engine, made by the commands that a user gives."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from models import compiled_by

CHECKPOINT = Path(__file__).parents[2] / "examples" / "storyteller"
_FOLDER = tempfile.TemporaryDirectory(prefix="mlc-story-")  # removed with the process

#: As the checkpoint's own chat template has it.
CONVERSATION = {
    "name": "storyteller",
    "system_template": "{system_message}",
    "system_message": "",
    "roles": {"user": "Q", "assistant": "A"},
    "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}"},
    "seps": [" ", "</s>"],
    "role_content_sep": ": ",
    "role_empty_sep": ":",
    "stop_str": [],
    "stop_token_ids": [0],
}


def _mlc(*arguments: str) -> None:
    command = [sys.executable, "-m", "tvm_flashinfer", "mlc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@functools.cache
def model_folder() -> Path:
    """Weights, tokenizer and chat configuration."""
    from mlc_llm.protocol.conversation_protocol import Conversation

    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    checkpoint = folder / "checkpoint"  # a copy: mlc_llm writes into its source's folder
    shutil.copytree(CHECKPOINT, checkpoint)
    shared = ["--model-type", "llama", "--quantization", "q0f32", "-o", str(folder)]
    _mlc("convert_weight", str(checkpoint), "--device", "cpu", *shared)
    _mlc("gen_config", str(checkpoint), "--conv-template", "LM", "--max-batch-size", "40", *shared)
    path = folder / "mlc-chat-config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    conversation = Conversation(**CONVERSATION).model_dump(by_alias=True, exclude_none=True)
    path.write_text(json.dumps(config | {"conv_template": conversation}))
    return folder


@functools.cache
def library(cache: str) -> Path:
    """The model compiled with a cache: "ours" or "tvm"."""
    folder = model_folder()
    path = folder / f"{cache}.so"
    compiled_by(cache, [str(folder / "mlc-chat-config.json"), "--device", "llvm", "-o", str(path)])
    return path
