"""The numbers of a run: one JSON object, and a table.

``{"machine": {...}, "versions": {...}, "rows": [...], "skipped": {name: why}}``, a row being
``{"suite", "case", "metric", "unit", "better", "ours", "floor", "peers", "samples"}``: raw medians,
no verdicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["Report", "Row"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured quantity.

    Attributes
    ----------
    floor: the best that the machine's own rates allow, in the same unit; None where there is no
        such bound.
    peers: the same quantity of others, by name.
    samples: how many measurements ``ours`` is the median of.
    along: for rows of one curve, what varies and its value here, as in ``("requests", 64)``; only
        for charts.
    """

    suite: str
    case: str
    metric: str
    unit: str
    better: Literal["higher", "lower"]
    ours: float
    floor: float | None
    peers: Mapping[str, float]
    samples: int
    along: tuple[str, float] | None = None

    def ratio(self, value: float) -> float:
        """How many times better ``ours`` is than ``value``."""
        return value / self.ours if self.better == "lower" else self.ours / value


@dataclasses.dataclass
class Report:
    """Everything a run found out."""

    machine: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            del row["along"]
        return {**dataclasses.asdict(self), "rows": rows}

    def print(self, console: Console) -> None:
        """A table: ours, the floor and each peer, and ours as a multiple of them."""
        table = Table(title="Benchmark", title_justify="left", header_style="bold")
        table.add_column("case")
        table.add_column("metric")
        for column in ("ours", "floor", "peers"):
            table.add_column(column, justify="right")
        for row in self.rows:
            floor = (
                "-" if row.floor is None else f"{_number(row.floor)} ({row.ratio(row.floor):.0%})"
            )
            peers = "\n".join(_peer(row, name) for name in row.peers)
            ours = f"[bold]{_number(row.ours)}[/]"
            table.add_row(row.case, f"{row.metric}, {row.unit}", ours, floor, escape(peers))
        console.print(table)
        console.print("In brackets: ours in terms of the floor, and how many times a peer's.")
        for name, why in self.skipped.items():
            console.print(f"skipped {name}: {why}", markup=False, soft_wrap=True)


def _peer(row: Row, name: str) -> str:
    value = row.peers[name]
    # How many times less one share is than another says nothing about speed.
    ratio = "" if row.unit == "%" else f" ({row.ratio(value):.1f}x)"
    return f"{name} {_number(value)}{ratio}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
