"""The examples of docs/variants.md run."""

from __future__ import annotations

import re
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "variants.md"


def test_examples_run() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == (8, 4, 64)  # type: ignore[attr-defined]
