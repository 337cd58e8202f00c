"""A module drawn: its operators from top to bottom, and every attention with the keys it sees."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from relax_passes.attention_site import AttentionSite
from relax_passes.explain import inspect_module
from relax_passes.graph import Graph, op_name
from relax_passes.known_shapes import with_known_shapes
from relax_passes.recognize import find_sites
from relax_passes.report import SiteReport

#: Queries and keys of the picture of a mask.
_CELLS = 24
_ROW, _WIDTH = 1.25, 9.0
_DONE, _LEFT = "#d8ecd9", "#f6d9d5"
_LEGEND = (
    "blue: keys, left to right, that queries, top to bottom, see; hatched: a tensor decides too"
)


@dataclass
class _Row:
    """Sites that are alike and follow each other, and the operators before the first."""

    site: SiteReport
    found: AttentionSite
    between: str
    last: int


def draw(mod: tvm.IRModule, path: Path, title: str = "") -> None:
    """Write an SVG, PNG or PDF file, by the suffix of ``path``; matplotlib draws it.

    A green box is an attention that is rewritten, a red one is left alone, with its reason.  The
    square beside it shows queries from top to bottom, keys from left to right, and which are seen
    as far as index arithmetic says; padding and mask tensors are hatched.
    """
    from matplotlib.figure import Figure

    rows, tail = _rows(mod)
    figure = Figure(figsize=(_WIDTH, _ROW * max(1, len(rows)) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(-_ROW * max(1, len(rows)) - 0.55, 0.45)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=11)
    axes.text(_WIDTH, 0.3, _LEGEND, fontsize=6.5, color="#555", ha="right", va="center")
    for number, row in enumerate(rows):
        _draw_row(axes, row, -_ROW * number)
    _between(axes, tail or "no attention", -_ROW * len(rows))
    figure.savefig(path)


def _rows(mod: tvm.IRModule) -> tuple[list[_Row], str]:
    report = iter(inspect_module(mod).sites)
    rows: list[_Row] = []
    between: Counter[str] = Counter()
    for _, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        graph = Graph(with_known_shapes(func))
        sites = {site.anchor: site for site in find_sites(func, graph)}
        for binding in graph.bindings:
            found = sites.pop(binding.var, None)
            if found is None:
                between[op_name(binding.value)] += 1
                continue
            row = _Row(next(report), found, _count(between), 0)
            row.last = row.site.layer
            between = Counter()
            if rows and _alike(rows[-1], row):
                rows[-1].last = row.last
            else:
                rows.append(row)
    return rows, _count(between)


def _alike(a: _Row, b: _Row) -> bool:
    def key(site: SiteReport) -> tuple[Any, ...]:
        heads = (site.num_qo_heads, site.num_kv_heads, site.head_dim)
        return (site.variant, site.mask, *heads, site.rewritten, site.reason)

    return key(a.site) == key(b.site)


def _count(operators: Counter[str]) -> str:
    """The operators that do work, the most frequent first."""
    layout = ("", "reshape", "permute_dims", "broadcast_to", "expand_dims", "astype", "squeeze")
    wanted = [(name, n) for name, n in operators.most_common() if name not in layout]
    shown = [f"{n} {name}" if n > 1 else name for name, n in wanted[:6]]
    return ", ".join(shown) + (", …" if len(wanted) > 6 else "")


def _between(axes: Any, text: str, top: float) -> None:
    axes.annotate(
        "",
        (0.55, top - 0.42),
        (0.55, top + 0.02),
        arrowprops={"arrowstyle": "-|>", "color": "#555"},
    )
    axes.text(0.75, top - 0.2, text, fontsize=7, color="#555", va="center")


def _draw_row(axes: Any, row: _Row, top: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    site = row.site
    _between(axes, row.between, top)
    bottom, height = top - _ROW + 0.06, _ROW - 0.5
    axes.add_patch(
        FancyBboxPatch(
            (0.2, bottom),
            _WIDTH - 1.5,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.06",
            facecolor=_DONE if site.rewritten else _LEFT,
            edgecolor="#777",
            linewidth=0.8,
        )
    )
    number = f"{site.layer}" if row.last == site.layer else f"{site.layer}-{row.last}"
    axes.text(0.35, bottom + height * 0.68, number, fontsize=11, weight="bold", va="center")
    axes.text(1.2, bottom + height * 0.68, site.variant, fontsize=10, weight="bold", va="center")
    heads = f"{site.num_qo_heads} query and {site.num_kv_heads} KV heads of {site.head_dim}"
    detail = f"mask: {site.mask}   ·   {heads}   ·   {site.dtype}   ·   scale {site.sm_scale:.4g}"
    text = detail if site.rewritten else f"left alone: {site.reason}"
    axes.text(1.2, bottom + height * 0.26, text, fontsize=7.5, va="center")
    _draw_mask(axes, row.found, (_WIDTH - 1.05, bottom - 0.02), height + 0.04)


def _draw_mask(axes: Any, site: AttentionSite, corner: tuple[float, float], side: float) -> None:
    """Which keys are seen, by the bounds of the mask."""
    import numpy as np
    from matplotlib.patches import Rectangle

    if not site.recognised:
        return
    mask = site.mask
    # Wide windows are drawn as a third of the square, so that they can be seen.
    query, key = np.indices((_CELLS, _CELLS))
    bound = max([1, *(abs(b) for b in (mask.upper, mask.lower) if b is not None)])
    unit = min(1.0, _CELLS / 3 / bound)
    seen = np.ones((_CELLS, _CELLS), bool)
    if mask.upper is not None:
        seen &= key <= query + mask.upper * unit
    if mask.lower is not None:
        seen &= key >= query + mask.lower * unit
    x, y = corner
    image = np.where(seen[..., None], [58, 110, 165], [235, 238, 243]).astype("uint8")
    axes.imshow(
        image, extent=(x, x + side, y, y + side), interpolation="nearest", aspect="auto", zorder=2
    )
    hatched = bool(mask.padding or mask.unproven)
    axes.add_patch(
        Rectangle(
            corner,
            side,
            side,
            fill=False,
            edgecolor="white" if hatched else "#777",
            hatch="///" if hatched else "",
            linewidth=0.5,
            zorder=3,
        )
    )
    axes.set_xlim(0, _WIDTH)
