"""MLC-LLM with our attention: ``import tvm_flashinfer.mlc``, then use mlc_llm as ever.

Importing this module finds mlc_llm, bridges it to the installed TVM where that is needed
(:mod:`tvm_flashinfer.mlc.bridges`) and puts our passes into its compilation pipeline
(:mod:`tvm_flashinfer.mlc.install`), all in the running process: nothing on disk is changed, and a
process that doesn't import this one has mlc_llm as it was. ``tvm-flashinfer mlc compile …`` is
``mlc_llm compile …`` with this import before it.

mlc_llm isn't on PyPI: it is installed as its own documentation says, or its Python sources are
named in ``TVM_FLASHINFER_MLC_LLM_PATH``: the folder that holds the package, ``python`` in a
checkout.

Raises :class:`MLCNotFoundError` where mlc_llm isn't there.
"""

from __future__ import annotations

from . import bridges
from .find import MLCNotFoundError, mlc_llm_folder, mlc_llm_version
from .install import install, uninstall

__all__ = [
    "MLCNotFoundError",
    "bridges",
    "install",
    "mlc_llm_folder",
    "mlc_llm_version",
    "uninstall",
]

install()
