"""Benchmarks: every number beside its floor and its peers, measured in the same run.

A suite is a module with ``run(context: Context) -> None``; ``SUITES`` names those there are.
Suites don't import the compiler: the command line hands them a function that compiles.
"""

from .report import Report, Row
from .suites import SUITES, Context

__all__ = ["SUITES", "Context", "Report", "Row"]
