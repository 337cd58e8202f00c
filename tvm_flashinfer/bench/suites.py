"""The suites there are, and what the command line hands to them."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from .report import Report

__all__ = ["SUITES", "Context", "GraphPasses", "load_suite"]

# Compiles a checkpoint into a directory: (checkpoint, directory, attention "ours" or "tir").
Compile = Callable[[Path, Path, str, int], None]


@dataclasses.dataclass(frozen=True)
class GraphPasses:
    """The graph passes that are measured, on the machine's own CPU.

    Attributes
    ----------
    target: the TVM target that they compile for.
    from_torch: ``from_torch(module, args)``, our importer.
    inject: a pass that replaces every attention of a module, or raises.
    lower: our pipeline from there to functions of the virtual machine.
    """

    target: Any
    from_torch: Callable[[Any, tuple[Any, ...]], Any]
    inject: Callable[[], Any]
    lower: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a suite works with.

    Attributes
    ----------
    report: where the rows go.
    progress: called with what is being done now.
    compile: ``compile(checkpoint, directory, attention, max_seq_len)``.
    passes: makes the graph passes; a layer below them can't import them.
    folder: an empty folder for checkpoints and models.
    device: ``cpu`` or ``cuda``; threads: CPU threads in use.
    cases: a glob of the cases that are wanted.
    """

    report: Report
    progress: Callable[[str], None]
    compile: Compile
    passes: Callable[[], GraphPasses]
    folder: Path
    device: str
    threads: int
    cases: str = "*"

    def wants(self, case: str) -> bool:
        """Whether ``case`` was asked for."""
        return fnmatch.fnmatchcase(case, self.cases)

    def has_packages(self, suite: str, *names: str) -> bool:
        """Whether packages of the extra `torch` are there; if not, the report says that `suite`
        is skipped for it."""
        if all(importlib.util.find_spec(name) for name in names):
            return True
        self.report.skipped[suite] = "not installed: pip install 'tvm-flashinfer[torch]'"
        return False


class Suite(Protocol):
    """A module of this package."""

    def run(self, context: Context) -> None: ...


SUITES = {
    "attention": "one layer on a CPU beside PyTorch, onnxruntime and TVM's kernels",
    "generate": "whole models: latency between tokens, attention's share, prefill",
    "schedule": "what a plan costs beside a plain sort of as many work items",
    "passes": "whole graphs with their attention rewritten, beside TVM's default pipeline",
    "kv-cache": "the KV cache beside TVM's own: steps, shared prompts, windows, memory",
    "mlc": "a Llama compiled by MLC-LLM: steps, and MLCEngine's tokens, beside TVM's cache",
    "linear": "linear layers beside numpy, PyTorch and TVM's own code",
}


def load_suite(name: str) -> Suite:
    """The module of a suite in ``SUITES``."""
    return cast(Suite, importlib.import_module(f".{name.replace('-', '_')}", __package__))
