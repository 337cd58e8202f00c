# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Makes the harness that these tests share with tests/gpu importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
