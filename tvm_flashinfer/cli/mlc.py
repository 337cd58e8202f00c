"""``mlc``: mlc_llm's own command line, with our attention installed first."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Sequence

from ..errors import UserError

#: Subcommands that run a model or read a tokenizer, for which mlc_llm's C++ library is needed.
NEED_LIBRARY = ("chat", "serve", "router", "calibrate", "gen_config")


def run_mlc(arguments: Sequence[str]) -> None:
    """``mlc_llm ARGUMENTS``. Its exit code is ours, and what it fails by is shown as its own."""
    import tvm_flashinfer.mlc  # noqa: F401
    from tvm_flashinfer.mlc.bridges import library_file

    command = arguments[0] if arguments else ""
    if command in NEED_LIBRARY and "--help" not in arguments and library_file() is None:
        raise UserError(
            f"mlc_llm {command} needs libmlc_llm_module.so, which isn't built; build it as "
            "https://llm.mlc.ai/docs/install/mlc_llm.html says. `tvm-flashinfer mlc compile` and "
            "`convert_weight` work without it"
        )
    before = sys.argv
    sys.argv = ["mlc_llm", *arguments]
    try:
        runpy.run_module("mlc_llm", run_name="__main__")
    except Exception as error:
        from .app import is_user_mistake

        if is_user_mistake(error):
            raise
        traceback.print_exception(error)
        raise SystemExit(1) from None
    finally:
        sys.argv = before
