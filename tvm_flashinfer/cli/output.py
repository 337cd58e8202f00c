"""What the commands print: progress on standard error, results on standard output."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

__all__ = ["Stages", "errors", "print_json", "print_report", "screen", "table"]

screen = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


class Stages:
    """Progress through named stages: a spinner on a terminal, a line for each one done.

    Attributes
    ----------
    seconds: time since the beginning.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._start = self._begin
        self._name: str | None = None
        self._status: Status | None = None

    def __call__(self, name: str) -> None:
        """Ends the stage before and begins ``name``."""
        self._end("[green]done[/]")
        self._name, self._start = name, time.perf_counter()
        if errors.is_terminal:
            self._status = errors.status(f"{escape(name)} ...")
            self._status.start()

    def note(self, text: str) -> None:
        """A line of explanation."""
        errors.print(f"[dim]{escape(text)}[/]", soft_wrap=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end("[green]done[/]" if error is None else "[red]failed[/]")

    def _end(self, how: str) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._name is not None:
            took = time.perf_counter() - self._start
            errors.print(f"  {how:>4}  {took:6.1f} s  {escape(self._name)}", soft_wrap=True)
            self._name = None


def print_json(value: Any) -> None:
    """One JSON value on standard output, and nothing else."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A plain table; numeric-looking columns are right-aligned."""
    result = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        numeric = bool(cells) and all(cell[:1].isdigit() or cell in ("", "-") for cell in cells)
        # A name that is too long goes on in the next line: cut short it says nothing.
        result.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(escape(cell) for cell in row))
    return result


def print_report(report: Mapping[str, Any], title: str) -> None:
    """The pass report: one row per attention site, and what stands against a rewrite."""
    rows = []
    for site in report.get("sites", []):
        heads = f"{site['num_qo_heads']}/{site['num_kv_heads']}"
        what = [str(site["form"]), str(site["variant"]), str(site["mask"]), heads]
        what.append(str(site["head_dim"]))
        if not site["num_qo_heads"]:
            what = ["-"] * len(what)  # not proven to be attention, and so not known
        verdict = "yes" if site["rewritten"] else f"no: {site['reason']}"
        rows.append([str(site["layer"]), *what, verdict])
    columns = ["layer", "form", "variant", "mask", "heads", "size", "rewritten"]
    screen.print(table(title, columns, rows))
    done = sum(bool(site["rewritten"]) for site in report.get("sites", []))
    screen.print(f"{done} of {len(rows)} attention sites rewritten.")
    for refusal in report.get("refusals", []):
        screen.print(f"[yellow]refused:[/] {escape(refusal)}", soft_wrap=True)
