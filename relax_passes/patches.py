"""PatchesToLinear: a convolution whose windows don't overlap is a linear layer of patches."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

from relax_passes.graph import dtype_of, ints, op_name, shape_of, static_int


@tvm.transform.module_pass(opt_level=0, name="PatchesToLinear")
class PatchesToLinear:
    """Before DispatchLinear, which then gives the product to a BLAS; ViT and CLIP begin with it.

    Before::

        y = R.nn.conv2d(x, weight, strides=[p, p])          # x [B, C, H, W], weight [N, C, p, p]

    After::

        a = R.reshape(x, [B, C, H / p, p, W / p, p])
        b = R.reshape(R.permute_dims(a, [0, 2, 4, 1, 3, 5]), [B, H / p * W / p, C * p * p])
        c = R.matmul(b, R.permute_dims(R.reshape(weight, [N, C * p * p])))
        y = R.reshape(R.permute_dims(c, [0, 2, 1]), [B, N, H / p, W / p])

    Only where the weight is a constant, sizes are known and windows fill the image.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        rewriter = _Rewriter(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and not (func.attrs and "Composite" in func.attrs):
                rewriter.builder_.update_func(gvar, rewriter.visit_expr(func))
        return rewriter.builder_.get()


@mutator
class _Rewriter(PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        sizes = _sizes(call) if op_name(call) == "nn.conv2d" else None
        if sizes is None:
            return call
        batch, channels, height, width, features, p, q = sizes
        emit, op = self.builder_.emit, relax.op
        down, across, depth = height // p, width // q, channels * p * q
        split = emit(op.reshape(call.args[0], [batch, channels, down, p, across, q]))
        patches = emit(op.permute_dims(split, [0, 2, 4, 1, 3, 5]))
        rows = emit(op.reshape(patches, [batch, down * across, depth]))
        weight = relax.const(call.args[1].value.numpy().reshape(features, depth))
        product = emit(op.matmul(rows, emit(op.permute_dims(weight))))
        planes = emit(op.permute_dims(product, [0, 2, 1]))
        return op.reshape(planes, [batch, features, down, across])


def _sizes(call: relax.Call) -> list[int] | None:
    """Batch, channels, height, width, features and the window, or None where it isn't one."""
    x, weight = call.args
    attrs = call.attrs
    shapes = [*(shape_of(x) or []), *(shape_of(weight) or [])]
    known = [size for dim in shapes if (size := static_int(dim)) is not None]
    if not isinstance(weight, GenericConst) or len(shapes) != 8 or len(known) != 8:
        return None
    batch, channels, height, width, features, depth, p, q = known
    layouts = [str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout)]
    if (
        layouts != ["NCHW", "OIHW", "NCHW"]
        or dtype_of(x) != dtype_of(weight)
        or str(attrs.out_dtype or dtype_of(x)) != dtype_of(x)
        or depth != channels
        or ints(attrs.strides) != [p, q]
        or any(ints(attrs.padding))
        or any(d != 1 for d in ints(attrs.dilation))
        or int(attrs.groups) != 1
        or height % p
        or width % q
    ):
        return None
    return [batch, channels, height, width, features, p, q]
