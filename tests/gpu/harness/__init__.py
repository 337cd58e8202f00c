# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Builds and drives the CUDA kernels without TVM: on the emulator, and on a bare GPU machine."""
