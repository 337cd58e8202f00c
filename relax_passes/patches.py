"""PatchesToLinear: convolutions that are cheap to write as a linear layer of patches."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

from relax_passes.graph import dtype_of, ints, op_name, shape_of, static_int


@tvm.transform.module_pass(opt_level=0, name="PatchesToLinear")
class PatchesToLinear:
    """Before DispatchLinear, which then gives the product to a BLAS.

    In two dimensions where windows don't overlap and fill the image, as ViT and CLIP begin.
    Before::

        y = R.nn.conv2d(x, weight, strides=[p, p])          # x [B, C, H, W], weight [N, C, p, p]

    After::

        a = R.reshape(x, [B, C, H / p, p, W / p, p])
        b = R.reshape(R.permute_dims(a, [0, 2, 4, 1, 3, 5]), [B, H / p * W / p, C * p * p])
        c = R.matmul(b, R.permute_dims(R.reshape(weight, [N, C * p * p])))
        y = R.reshape(R.permute_dims(c, [0, 2, 1]), [B, N, H / p, W / p])

    In one dimension windows may overlap, as Whisper begins: every element of a window is a slice.
    Before::

        y = R.nn.conv1d(x, weight, strides=[s], padding=[m, m])   # x [B, C, T], weight [N, C, k]

    After, U being the length of y::

        a = R.nn.pad(R.permute_dims(x, [0, 2, 1]), [0, 0, m, m, 0, 0])
        b = R.concat((a[:, 0 : .. : s], a[:, 1 : .. : s], ..), axis=2)            # [B, U, k * C]
        y = R.permute_dims(R.matmul(b, R.permute_dims(<weight [N, k * C]>)), [0, 2, 1])

    Only where the weight is a constant and sizes are known.
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
        name = op_name(call)
        if name == "nn.conv1d" and (sizes := _sizes(call, ["NCW", "OIW", "NCW"])):
            return self._sequence(call, *sizes)
        if name == "nn.conv2d" and (sizes := _sizes(call, ["NCHW", "OIHW", "NCHW"])):
            *_, height, width, _, _, p, q = sizes
            fills = ints(call.attrs.strides) == [p, q] and not (height % p or width % q)
            if fills and not any(ints(call.attrs.padding)):
                return self._image(call, *sizes)
        return call

    def _image(
        self,
        call: relax.Call,
        batch: int,
        channels: int,
        height: int,
        width: int,
        features: int,
        _depth: int,
        p: int,
        q: int,
    ) -> relax.Expr:
        emit, op = self.builder_.emit, relax.op
        down, across, depth = height // p, width // q, channels * p * q
        split = emit(op.reshape(call.args[0], [batch, channels, down, p, across, q]))
        patches = emit(op.permute_dims(split, [0, 2, 4, 1, 3, 5]))
        rows = emit(op.reshape(patches, [batch, down * across, depth]))
        weight = relax.const(call.args[1].value.numpy().reshape(features, depth))
        product = emit(op.matmul(rows, emit(op.permute_dims(weight))))
        planes = emit(op.permute_dims(product, [0, 2, 1]))
        return op.reshape(planes, [batch, features, down, across])

    def _sequence(
        self,
        call: relax.Call,
        _batch: int,
        _channels: int,
        length: int,
        features: int,
        _depth: int,
        window: int,
    ) -> relax.Expr:
        emit, op = self.builder_.emit, relax.op
        (stride,), (before, after) = ints(call.attrs.strides), ints(call.attrs.padding)
        tokens = emit(op.permute_dims(call.args[0], [0, 2, 1]))
        if before or after:
            tokens = emit(op.nn.pad(tokens, [0, 0, before, after, 0, 0]))
        reach = (length + before + after - window) // stride * stride + 1
        slices = [
            emit(op.strided_slice(tokens, [1], [n], [n + reach], [stride])) for n in range(window)
        ]
        rows = emit(op.concat(slices, 2))
        weight: Any = call.args[1].value.numpy().swapaxes(1, 2).reshape(features, -1)
        product = emit(op.matmul(rows, emit(op.permute_dims(relax.const(weight.copy())))))
        return op.permute_dims(product, [0, 2, 1])


def _sizes(call: relax.Call, layouts: list[str]) -> list[int]:
    """Those of x and then of the weight, as numbers; none where the layouts are others, or the
    convolution is dilated, in groups or of another dtype.
    """
    x, weight = call.args
    attrs = call.attrs
    shapes = [*(shape_of(x) or []), *(shape_of(weight) or [])]
    known = [size for dim in shapes if (size := static_int(dim)) is not None]
    rank = len(layouts[0])
    if not isinstance(weight, GenericConst) or len(shapes) != 2 * rank or len(known) != 2 * rank:
        return []
    if (
        [str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout)] != layouts
        or dtype_of(x) != dtype_of(weight)
        or str(attrs.out_dtype or dtype_of(x)) != dtype_of(x)
        or known[1] != known[rank + 1]
        or any(d != 1 for d in ints(attrs.dilation))
        or int(attrs.groups) != 1
    ):
        return []
    return known
