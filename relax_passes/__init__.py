"""Relax passes that find attention in a model graph and hand it to tvm_flashinfer's kernels."""
