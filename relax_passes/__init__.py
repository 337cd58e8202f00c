"""Relax passes that find attention in a model graph and hand it to tvm_flashinfer's kernels."""

import tvm.ir

if not hasattr(tvm.ir, "GenericConst"):
    raise ImportError(
        "relax_passes, which compile models, need TVM 0.27 or later; this is TVM "
        f"{tvm.__version__}, with which tvm_flashinfer runs models that are compiled"
    )
