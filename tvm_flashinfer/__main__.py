"""``python -m tvm_flashinfer`` and the console script ``tvm-flashinfer``."""

from __future__ import annotations

import sys

from tvm_flashinfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
