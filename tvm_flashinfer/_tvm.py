"""What Python code that runs with every served TVM imports, where releases name it differently.

The runtime, kernels and variants run with TVM 0.26 and 0.27; compiling models, which is
``relax_passes``, needs 0.27. What C++ code needs is in ``cuda_src/runtime/tvm_kv_state.h``.
"""

from __future__ import annotations

try:
    from tvm import sym
except ImportError:  # TVM 0.26
    from tvm import arith as sym

__all__ = ["sym"]
