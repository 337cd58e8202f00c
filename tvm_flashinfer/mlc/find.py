"""Finds mlc_llm without importing it."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

from ..errors import UserError

ENV_PATH = "TVM_FLASHINFER_MLC_LLM_PATH"


class MLCNotFoundError(UserError, ImportError):
    """mlc_llm can't be imported, or used; the message says what to do."""


def put_on_path() -> None:
    """Let ``import mlc_llm`` find what ``TVM_FLASHINFER_MLC_LLM_PATH`` names, if it is set."""
    named = os.environ.get(ENV_PATH)
    if not named:
        return
    folder = Path(named).expanduser().resolve()
    if not (folder / "mlc_llm" / "__init__.py").is_file():
        raise MLCNotFoundError(
            f"{ENV_PATH}={named} holds no package mlc_llm; name the folder `python` of an "
            "MLC-LLM checkout"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    # Subprocesses, as those by which mlc_llm compiles a model on demand, find it too.
    inherited = os.environ.get("PYTHONPATH", "")
    if str(folder) not in inherited.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), inherited)))


def mlc_llm_folder() -> Path:
    """The folder of the package mlc_llm; MLCNotFoundError if there is none."""
    put_on_path()
    spec = importlib.util.find_spec("mlc_llm")
    if spec is None or not spec.submodule_search_locations:
        raise MLCNotFoundError(
            "mlc_llm is not installed: install it as https://llm.mlc.ai/docs/install/mlc_llm.html "
            f"says, or name the folder `python` of a checkout in {ENV_PATH}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def mlc_llm_version() -> str:
    """mlc_llm's version, as its sources name it."""
    text = (mlc_llm_folder() / "libinfo.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return found.group(1) if found else "unknown"
