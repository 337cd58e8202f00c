"""Charts of a report: a PNG for each metric."""

from __future__ import annotations

import math
import re
from pathlib import Path

from ..errors import UserError
from .report import Report, Row

__all__ = ["draw"]


def draw(report: Report, directory: Path) -> list[Path]:
    """Writes a chart for each (suite, metric) into ``directory``; returns the files.

    Bars for cases, and a curve for the rows that have an ``along``.

    Raises UserError if matplotlib isn't installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "--plot needs matplotlib; install it with: pip install 'tvm-flashinfer[bench]'"
        ) from error
    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.suite, row.metric), []).append(row)
    files = []
    for (suite, metric), rows in groups.items():
        name = re.sub(r"[^a-z0-9]+", "-", f"{suite} {metric}".lower()).strip("-")
        bars = [row for row in rows if row.along is None]
        if bars:
            files.append(_chart(bars, directory / f"{name}.png"))
        curve = [row for row in rows if row.along is not None]
        if len(curve) > 1:
            files.append(_curve(curve, directory / f"{name}-curve.png"))
    return files


def _curve(rows: list[Row], path: Path) -> Path:
    """One metric over what varies, both logarithmic, with a line that grows as n log n."""
    from matplotlib.figure import Figure

    points = sorted((row.along[1], row) for row in rows if row.along is not None)
    sizes, rows = [size for size, _ in points], [row for _, row in points]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(sizes, [row.ours for row in rows], marker="o", label="ours")
    for name in dict.fromkeys(name for row in rows for name in row.peers):
        axes.plot(sizes, [row.peers.get(name, math.nan) for row in rows], marker="s", label=name)
    growth = [size * math.log(size + 1) for size in sizes]
    guide = [rows[0].ours * value / growth[0] for value in growth]
    axes.plot(sizes, guide, color="black", linestyle="dotted", label="n log n")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(rows[0].along[0] if rows[0].along else "")
    axes.set_ylabel(f"{rows[0].metric}, {rows[0].unit} ({rows[0].better} is better)")
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


def _chart(rows: list[Row], path: Path) -> Path:
    from matplotlib.figure import Figure

    names = ["ours", *dict.fromkeys(name for row in rows for name in row.peers)]
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(rows) * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        values = [row.ours if name == "ours" else row.peers.get(name, 0.0) for row in rows]
        places = [place + index * height for place in range(len(rows))]
        bars = axes.barh(places, values, height, label=name)
        axes.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], padding=3)
    for place, row in enumerate(rows):
        if row.floor is not None:
            label = "floor" if place == 0 else "_nolegend_"
            ends = (place - height / 2, place + 0.8 - height / 2)
            axes.vlines(row.floor, *ends, colors="black", linestyles="dashed", label=label)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))])
    axes.set_yticklabels([row.case for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"{rows[0].metric}, {rows[0].unit} ({rows[0].better} is better)")
    axes.legend()
    figure.savefig(path, dpi=150)
    return path
