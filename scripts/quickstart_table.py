"""Prints the quickstart table: our attention beside TVM's own, on the same checkpoint and prompts.

Usage: quickstart_table.py OURS TVM: two directories made by `tvm-flashinfer compile`, each with the
output of `tvm-flashinfer generate --json` beside it (OURS.json, TVM.json).
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest of a compiled model, and what `generate --json` said of it."""
    manifest = json.loads((directory / "manifest.json").read_text())
    return manifest, json.loads(directory.with_name(directory.name + ".json").read_text())


def latency(run: dict[str, Any]) -> float:
    """Median time between two tokens of an answer, in milliseconds."""
    return 1e3 * statistics.median(c["token_seconds"] for c in run["completions"])


def main(ours_dir: Path, tvm_dir: Path) -> None:
    manifest, ours = read(ours_dir)
    _, tvm = read(tvm_dir)
    sites = manifest["report"]["sites"]
    rewritten = sum(site["rewritten"] for site in sites)

    table = Table(
        title="Our attention and TVM's own",
        title_justify="left",
        caption="TVM's own: its KV cache and its default CPU pipeline. Same weights, same prompts.",
        caption_justify="left",
    )
    for column in ("", "tvm-flashinfer", "TVM's own", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("attention sites rewritten", f"{rewritten} of {len(sites)}", "", "")
    for name, key in (("prefill, tokens/s", "prefill"), ("decode, tokens/s", "decode")):
        a, b = (run["stats"][f"{key}_tokens_per_second"] for run in (ours, tvm))
        table.add_row(name, f"{a:.0f}", f"{b:.0f}", f"{a / b:.1f}x")
    a, b = latency(ours), latency(tvm)
    table.add_row("inter-token latency, ms", f"{a:.2f}", f"{b:.2f}", f"{b / a:.1f}x")
    texts = [[completion["text"] for completion in run["completions"]] for run in (ours, tvm)]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    table.add_row("same answers, greedy", f"{same} of {len(texts[0])}", "", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
