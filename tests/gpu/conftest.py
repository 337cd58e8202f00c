# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Without a CUDA device these tests are not collected: they are run by scripts/gpu_check.sh."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

collect_ignore_glob: list[str] = []
try:
    import torch

    if not torch.cuda.is_available():
        collect_ignore_glob.append("test_*.py")
except ImportError:
    collect_ignore_glob.append("test_*.py")
