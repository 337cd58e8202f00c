"""``inspect``: what the passes find in a checkpoint or a module, one site explained, a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .output import Stages, errors, print_json, print_report, screen

__all__ = ["run_inspect"]


def run_inspect(
    source: Path, *, dtype: str | None, site: int | None, draw: list[Path], as_json: bool
) -> None:
    """See ``tvm-flashinfer inspect --help``."""
    for path in draw:
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path} can't be written: its folder doesn't exist.")
    if draw and importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "A picture needs matplotlib; install it with: pip install 'tvm-flashinfer[bench]'."
        )
    explanation = None
    with Stages() as stages:
        stages("load the compiler")
        from relax_passes.explain import explain, inspect_module
        from relax_passes.module_file import load_module

        if source.is_file():
            stages("read the module")
            mod = load_module(source)
            report: Mapping[str, Any] = inspect_module(mod).as_dict()
        else:
            from relax_passes.importer import import_causal_lm
            from relax_passes.pipeline import inspect_causal_lm

            stages("import the checkpoint")
            imported = import_causal_lm(source, dtype=dtype)
            mod, report = imported.module, inspect_causal_lm(imported).as_dict()
        if site is not None:
            stages(f"explain site {site}")
            explanation = explain(mod, site)
        for path in draw:
            from relax_passes.draw import draw as draw_module

            stages(f"draw {path}")
            draw_module(mod, path, source.name)
    if explanation is not None and as_json:
        print_json(explanation.as_dict())
    elif explanation is not None:
        _print_site(explanation)
    elif as_json:
        print_json(report)
    else:
        print_report(report, title=f"Attention in {source.name or source}")
    for path in draw:
        errors.print(f"written: {path}", markup=False, soft_wrap=True)


def _print_site(explanation: Any) -> None:
    site = explanation.site

    def part(title: str, text: str) -> None:
        screen.print(f"[bold]{title}[/]")
        screen.print(text, markup=False, soft_wrap=True)
        screen.print()

    heads = f"{site.num_qo_heads} query heads on {site.num_kv_heads}, of {site.head_dim} elements"
    known = (
        f"form {site.form}, variant {site.variant}, mask {site.mask}; {heads}, {site.dtype}, "
        f"scale {site.sm_scale:.6g}; "
    )
    done = "rewritten" if site.rewritten else f"left alone: {site.reason}"
    # Nothing else is known of a site that isn't proven to be attention.
    part(f"Site {site.layer}: {site.name}", (known if site.num_qo_heads else "") + done)
    part("Before", explanation.before)
    if site.rewritten:
        part("After", explanation.after)
        part("Kernel", explanation.source)
