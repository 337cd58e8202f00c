"""A Relax module from a Python file: TVMScript as TVM prints it, or a script that makes one."""

from __future__ import annotations

import ast
import contextlib
import re
import runpy
import sys
from pathlib import Path

import tvm

__all__ = ["ModuleError", "load_module"]

#: Numbers that TVM prints as strings, which its parser refuses.
_PRINTED_NUMBER = re.compile(r'R\.const\("(-?inf|nan)"')


class ModuleError(ValueError):
    """A module, or a number of a site in it, that can't be used; one sentence."""


def load_module(path: Path) -> tvm.IRModule:
    """The module that a ``.py`` file holds, or that it makes when it is run.

    A file of imports and one class decorated with ``ir_module`` is read as TVMScript, as
    ``mod.script()`` writes it.  Any other file is run like a program: the module is its variable
    ``mod``, or the only one of its variables that is a module.

    Raises
    ------
    ModuleError
        There is none.
    """
    if path.suffix != ".py":
        raise ModuleError(
            f"{str(path)!r} is no module; accepted are TVMScript and scripts that make a module, "
            "in a .py file."
        )
    try:
        text = path.read_text(encoding="utf-8")
        if _is_tvm_script(text):
            return _parse(path, text)
        return _run(path)
    except ModuleError:
        raise
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModuleError(
            f"{str(path)!r} can't be read as a module: {line.rstrip('.')}."
        ) from error


def _is_tvm_script(text: str) -> bool:
    """Whether there is nothing but imports, symbolic lengths and one module."""
    body = [node for node in ast.parse(text).body if not _is_preamble(node)]
    if len(body) != 1 or not isinstance(body[0], ast.ClassDef):
        return False
    return any("ir_module" in ast.unparse(name) for name in body[0].decorator_list)


def _is_preamble(node: ast.stmt) -> bool:
    """An import, or ``n = TypeVar("n")``, as lengths are printed."""
    length = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("TypeVar(")
    return length or isinstance(node, ast.Import | ast.ImportFrom)


def _parse(path: Path, text: str) -> tvm.IRModule:
    # Tensors are printed as items of `metadata`, which printed modules don't carry along.
    if 'metadata["' in text:
        raise ModuleError(
            f"{str(path)!r} has constants whose values TVMScript leaves out (metadata[...]); "
            "accepted are modules without such, and scripts that make the module."
        )
    # TVM's parser knows T, R and I, and takes no import of them.
    kept = [line for line in text.splitlines() if not line.startswith(("from ", "import "))]
    return tvm.script.from_source(_PRINTED_NUMBER.sub(r'R.const(float("\1")', "\n".join(kept)))


def _run(path: Path) -> tvm.IRModule:
    sys.path.insert(0, str(path.absolute().parent))
    try:
        # What the script prints isn't part of a report.
        with contextlib.redirect_stdout(sys.stderr):
            names = runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.path.pop(0)
    made = {name: value for name, value in names.items() if isinstance(value, tvm.IRModule)}
    if "mod" in made:
        return made["mod"]
    if len(made) != 1:
        found = f"{len(made)} are: {', '.join(made)}" if made else "none is"
        raise ModuleError(
            f"{str(path)!r} leaves no module in 'mod', and of its other variables {found}."
        )
    return next(iter(made.values()))
