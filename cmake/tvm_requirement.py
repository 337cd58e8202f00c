"""What an installation of tvm-flashinfer depends on: asked by scikit-build-core (pyproject.toml).

The library is compiled for one TVM, so a wheel requires that one: the distribution that provides
``import tvm`` where it is built, at its version. That is apache-tvm by default, which an isolated
build installs; with ``--no-build-isolation`` it may be any other, such as MLC's own build, and
apache-tvm is then not asked for. A TVM that no distribution provides, as a checkout on PYTHONPATH,
is not asked for either.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def dynamic_metadata(field: str, settings: Mapping[str, Any]) -> list[str]:
    """``always`` of the settings, and the requirement on TVM."""
    if field != "dependencies" or settings.keys() != {"always", "default"}:
        raise RuntimeError("tvm_requirement makes `dependencies` from `always` and `default`")
    return [*settings["always"], *tvm_requirement(settings["default"])]


def tvm_requirement(default: str) -> Iterator[str]:
    """The TVM that is imported here; `default` where none can be."""
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        yield default
        return
    package = Path(spec.origin).resolve()
    for name in importlib.metadata.packages_distributions().get("tvm", []):
        distribution = importlib.metadata.distribution(name)
        if Path(str(distribution.locate_file("tvm/__init__.py"))).resolve() == package:
            yield f"{distribution.name}=={distribution.version}"
            return
