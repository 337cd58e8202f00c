"""The examples of the documentation run, each page as one program."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["kernels", "variants", "passes"])
def test_examples_run(page: str, tmp_path: Path) -> None:
    if page == "passes":
        pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) > 1
    program = tmp_path / f"{page}.py"  # a file, since TVM's script parser reads the source
    program.write_text("\n".join(blocks))
    runpy.run_path(str(program))
