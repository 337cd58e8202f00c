#!/usr/bin/env python3
"""Times ``tvm_flashinfer.linear`` beside numpy, PyTorch and TVM's default code.

    python scripts/bench_linear.py --threads 2 --cases 'float32-1x*' --json linear.json

Cases are named DTYPE-ROWSxKxN. The floor is the weight over the measured read bandwidth, or the
arithmetic over the measured matrix rate, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", default="*", help="a glob, as float32-1x*")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Read by the libraries when they are loaded, hence before the imports.
    for variable in ("TVM_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[variable] = str(options.threads)

    from rich.console import Console

    import tvm_flashinfer  # noqa: F401  # registers the function
    from tvm_flashinfer.bench import linear
    from tvm_flashinfer.bench.machine import describe, versions
    from tvm_flashinfer.bench.report import Report
    from tvm_flashinfer.bench.suites import Context

    def no_models(*_: object) -> None:
        raise AssertionError("this suite compiles no model")

    console = Console(stderr=True)
    report = Report(machine=describe(options.threads), versions=versions())
    with console.status("") as status:
        linear.run(
            Context(
                report=report,
                progress=status.update,
                compile=no_models,
                folder=Path(),
                device="cpu",
                threads=options.threads,
                cases=options.cases,
            )
        )
    report.print(Console())
    if options.json:
        options.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
