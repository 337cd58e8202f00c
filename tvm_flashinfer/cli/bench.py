"""``bench``: runs a suite, prints its table, writes its JSON and charts."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from .._threads import num_threads
from ..bench.suites import GraphPasses
from ..errors import UserError
from .output import Stages, errors, screen

__all__ = ["run_bench"]


def run_bench(
    suite: str,
    *,
    device: str,
    threads: int | None,
    cases: str,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Measures ``suite``; see ``tvm-flashinfer bench --help``."""
    if threads is not None:
        # Read when the libraries are loaded and TVM's pool starts, which is later than this.
        for name in ("TVM_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ[name] = str(threads)
    from .._library import load
    from ..bench import SUITES, Context, Report
    from ..bench.machine import describe, versions
    from ..bench.suites import load_suite

    if suite not in SUITES:
        available = ", ".join(SUITES)
        raise UserError(f"There is no suite {suite!r}; available: {available}.")
    if device not in ("cpu", "cuda"):
        raise UserError(f"The device is {device!r}, but cpu or cuda is needed.")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"{json_file} can't be written: its folder doesn't exist.")
    load()
    count = threads or num_threads()
    report = Report(machine=describe(count), versions=versions())
    with Stages() as stages, tempfile.TemporaryDirectory(prefix="tvm-flashinfer-") as folder:
        context = Context(
            report=report,
            progress=stages,
            compile=_compile,
            passes=_passes,
            folder=Path(folder),
            device=device,
            threads=count,
            cases=cases,
        )
        load_suite(suite).run(context)
    if not report.rows and not report.skipped:
        raise UserError(f"No case of suite {suite} matches {cases!r}.")
    report.print(screen)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
        errors.print(f"written: {json_file}", markup=False, soft_wrap=True)
    if plot is not None:
        from ..bench.plot import draw

        for path in draw(report, plot):
            errors.print(f"written: {path}", markup=False, soft_wrap=True)


def _compile(checkpoint: Path, directory: Path, attention: str, max_seq_len: int) -> None:
    from .compile import Options, compile_checkpoint

    options = Options(dtype="float32", attention=attention, max_batch=1, max_seq_len=max_seq_len)
    compile_checkpoint(checkpoint, directory, options, progress=lambda stage: None)


def _passes() -> GraphPasses:
    from relax_passes.frontend import from_torch
    from relax_passes.inject import InjectAttention
    from relax_passes.pipeline import lower_pipeline
    from relax_passes.targets import resolve_target

    target = resolve_target("native")
    return GraphPasses(
        target=target,
        from_torch=from_torch,
        inject=lambda: InjectAttention(target=target, strict=True),
        lower=lambda: lower_pipeline(target),
    )
