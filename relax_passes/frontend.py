"""PyTorch models to Relax with their attention whole, and right where TVM's importer isn't.

    mod = from_torch(model, (ids, mask), dynamic_shapes=({1: length}, {1: length}))

TVM 0.27's importer, used as it is, gives wrong results or graphs that can't be compiled for some of
what real models contain; ``torch.export`` with its default decompositions adds more:

- ``scaled_dot_product_attention`` is decomposed into some twenty operators, which fails for GPT-2
  ("Cannot view a tensor"); undecomposed, TVM's converter ignores ``scale`` and ``enable_gqa`` and
  refuses boolean masks.
- ``cumsum`` of booleans stays boolean and then can't be compiled, which is what causal models
  traced without an attention mask contain.
- ``x[:, :length]`` of a table gets the length ``min(length, size)``, after which nothing has a
  known shape (BERT, with dynamic lengths).
- Linear layers of float16 and bfloat16 give float32, to which a bias can't be added.
- Constant indices below 0, as in ``x[:, :, [-1]]`` (Falcon), read out of bounds.

Training mode and dropout are refused: TVM's importer drops dropout without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

from relax_passes.graph import axis_of, op_name, shape_of, static_int

Converters = dict[str, Callable[..., relax.Var]]


def from_torch(
    source: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    keep_params_as_input: bool = False,
    unwrap_unit_return_tuple: bool = True,
    convert_map: Converters | None = None,
) -> tvm.IRModule:
    """Import a module, or an exported program, with every SDPA as one ``R.nn.attention``.

    Parameters
    ----------
    source : torch.nn.Module | torch.export.ExportedProgram
        A module in eval mode is exported with ``args``, ``kwargs`` and ``dynamic_shapes``, which
        are those of ``torch.export.export``.
    keep_params_as_input, unwrap_unit_return_tuple
        As of TVM's ``from_exported_program``.
    convert_map
        Converters of one's own, which come before ours.

    Raises
    ------
    ValueError
        The module is in training mode, or the program has dropout that isn't off.
    """
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    program = source
    if isinstance(source, torch.nn.Module):
        if source.training:
            raise ValueError(
                "the module is in training mode, whose dropout TVM's importer drops; "
                "accepted are modules in eval mode: model.eval()."
            )
        with torch.no_grad():
            program = torch.export.export(
                source, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes
            )
    _refuse_dropout(program)
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten.scaled_dot_product_attention.default, None)
    mod = from_exported_program(
        program.run_decompositions(table),
        keep_params_as_input=keep_params_as_input,
        unwrap_unit_return_tuple=unwrap_unit_return_tuple,
        run_ep_decomposition=False,
        custom_convert_map={**attention_convert_map(), **(convert_map or {})},
    )
    main = mod.get_global_var("main")
    mod.update_func(main, WrapIndices(mod).visit_expr(mod[main]))
    return mod


def _refuse_dropout(program: Any) -> None:
    """A sentence for the first dropout that is on: ``aten.*dropout*(x, p, train)``."""
    for node in program.graph.nodes:
        if "dropout" in str(node.target) and node.op == "call_function":
            p, train = (*node.args[1:], *node.kwargs.values())[:2]
            if p and train:
                raise ValueError(
                    f"{node.target} with p={p} in training mode, which TVM's importer drops; "
                    "accepted are programs of modules in eval mode: model.eval()."
                )


def attention_convert_map() -> Converters:
    """``custom_convert_map`` entries for TVM's ``from_exported_program``: what from_torch mends in
    single operators.

    ``scaled_dot_product_attention`` arrives whole only if the program wasn't decomposed, or was
    without it (see :func:`from_torch`).
    """
    return {
        "scaled_dot_product_attention.default": _convert_sdpa,
        "cat.default": _convert_cat,
        "cumsum.default": _convert_cumsum,
        "slice.Tensor": _convert_slice,
        "mm.default": _convert_mm,
        "bmm.default": _convert_mm,
        "addmm.default": _convert_addmm,
    }


def undecomposed_convert_map() -> Converters:
    """Entries for programs imported with ``run_ep_decomposition=False`` and not decomposed at all.

    Besides attention, ``linear`` keeps the dtype of its input, where TVM's own converter always
    makes float32.
    """
    return {
        "scaled_dot_product_attention.default": _convert_sdpa,
        "linear.default": _convert_linear,
        "to.device": _convert_to,
        "to.dtype_layout": _convert_to,
        "where.ScalarOther": _convert_where,
        "where.ScalarSelf": _convert_where,
        "where.Scalar": _convert_where,
        "numpy_T.default": _convert_transpose,
        "div_.Tensor": _convert_divide,
        "sym_max": _convert_sym_max,
        "repeat_interleave.self_int": _convert_repeat,
    }


# ---------------------------------------------------------------------------------------------
# converters: (node, importer) -> the variable that holds the node's value


def _convert_sdpa(node: Any, importer: Any) -> relax.Var:
    """``aten.scaled_dot_product_attention`` on [.., H, S, D] to ``R.nn.attention`` on [B, S, H,
    D].
    """
    import torch

    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    named = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if named.get("dropout_p") or 0.0:
        raise ValueError(
            f"scaled_dot_product_attention with dropout_p={named['dropout_p']}; accepted is 0."
        )
    emit = importer.block_builder.emit
    query, key, value = (importer.env[named[k]] for k in names[:3])
    shape = list(query.ty.shape)
    # With ``enable_gqa`` groups of heads share one of k; without it one head may serve them all.
    key, value = (_repeat_heads(emit, x, query) for x in (key, value))
    query, key, value = (
        emit(relax.op.permute_dims(_four_axes(emit, x), [0, 2, 1, 3])) for x in (query, key, value)
    )
    bias = None
    if named.get("attn_mask") is not None:
        mask_node = named["attn_mask"]
        bias = _four_axes(emit, importer.env[mask_node])
        dtype = query.ty.dtype.dtype
        if mask_node.meta["val"].dtype is torch.bool:
            if bias.ty.dtype.dtype != "bool":
                # TVM imports bool `new_ones` and `&` as int64; only zero or not matters here.
                bias = emit(relax.op.astype(bias, "bool"))
            zero, minus = relax.const(0.0, dtype), relax.const(-math.inf, dtype)
            bias = emit(relax.op.where(bias, zero, minus))
    causal = "TopLeft" if named.get("is_causal") else None
    out = emit(relax.op.nn.attention(query, key, value, bias, named.get("scale"), causal))
    out = emit(relax.op.permute_dims(out, [0, 2, 1, 3]))
    if len(shape) == 4:
        return out
    return emit(relax.op.reshape(out, [*shape[:-1], value.ty.shape[-1]]))


def _four_axes(emit: Callable[..., relax.Var], x: relax.Var) -> relax.Var:
    """A tensor of fewer axes with leading ones; of more, with the leading ones folded."""
    shape = list(x.ty.shape)
    if len(shape) == 4:
        return x
    lead: Any = 1
    for extent in shape[:-3]:
        lead = lead * extent
    return emit(relax.op.reshape(x, [lead, *([1] * (3 - len(shape))), *shape[-3:]]))


def _repeat_heads(emit: Callable[..., relax.Var], x: relax.Var, query: relax.Var) -> relax.Var:
    """[.., Hkv, T, D] to [.., H, T, D]: each KV head serves H // Hkv consecutive query heads."""
    if len(x.ty.shape) < 3:
        return x
    *lead, kv_heads, length, dim = x.ty.shape
    heads = int(query.ty.shape[-3])
    group = heads // int(kv_heads)
    if group == 1:
        return x
    x = emit(relax.op.expand_dims(x, len(lead) + 1))
    x = emit(relax.op.broadcast_to(x, [*lead, kv_heads, group, length, dim]))
    return emit(relax.op.reshape(x, [*lead, heads, length, dim]))


def _convert_cat(node: Any, importer: Any) -> relax.Var:
    """``aten.cat``, which passes over tensors of shape [0]: an empty cache of transformers."""
    named = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
    values = [importer.env[x] for x in named["tensors"]]
    kept = [x for x in values if [static_int(n) for n in shape_of(x) or ()] != [0]] or values[:1]
    if len(kept) == 1:
        return kept[0]
    return importer.block_builder.emit(relax.op.concat(kept, named.get("dim", 0)))


def _convert_cumsum(node: Any, importer: Any) -> relax.Var:
    """``aten.cumsum``: whole numbers, booleans among them, are summed as int64, as in torch."""
    x = importer.env[node.args[0]]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    if x.ty.dtype.dtype == "bool":
        x = importer.block_builder.emit(relax.op.astype(x, dtype))
    return importer.block_builder.emit(relax.op.cumsum(x, dim, dtype))


def _convert_slice(node: Any, importer: Any) -> relax.Var:
    """``aten.slice``: an end that is a symbolic length lies within the tensor, as torch has
    checked while exporting.
    """
    import torch

    given, defaults = list(node.args), [0, None, None, 1]
    x, axis, start, end, step = given + defaults[len(given) - 1 :]
    if not isinstance(end, torch.fx.Node) or start not in (0, None) or step != 1:
        return importer._slice(node)
    source, stop = importer.env[x], importer.env[end]
    shape = shape_of(source)
    if shape is None or not tvm.ir.is_prim_expr(stop):
        return importer._slice(node)
    axis = axis_of(axis, len(shape))
    size, found = node.args[0].meta["val"].shape[axis], node.meta["val"].shape[axis]
    if not isinstance(size, int) or (found is not end.meta["val"] and found != end.meta["val"]):
        return importer._slice(node)
    return importer.block_builder.emit(
        relax.op.strided_slice(source, [axis], [0], [stop], [1], assume_inbound=True)
    )


def _convert_where(node: Any, importer: Any) -> relax.Var:
    """``aten.where`` whose values, one or both, are numbers."""
    emit = importer.block_builder.emit
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    condition, *values = node.args
    condition = importer.env[condition]
    if condition.ty.dtype.dtype != "bool":
        condition = emit(relax.op.astype(condition, "bool"))
    a, b = (
        relax.const(v, dtype) if isinstance(v, int | float) else importer.env[v] for v in values
    )
    return emit(relax.op.where(condition, a, b))


def _convert_divide(node: Any, importer: Any) -> relax.Var:
    """``x /= y``, where nothing reads x afterwards but as the result."""
    x, y = node.args
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    if any(order[user] > order[node] for user in x.users):
        raise ValueError("a tensor is read after it was divided in place")
    a = importer.env[x]
    b = importer.env[y] if y in importer.env else relax.const(y, a.ty.dtype.dtype)
    return importer.block_builder.emit(relax.op.divide(a, b))


def _convert_sym_max(node: Any, importer: Any) -> Any:
    """The larger of two lengths."""
    a, b = (importer.env.get(x, x) if not isinstance(x, int) else x for x in node.args)
    return tvm.tirx.max(a, b)


def _convert_transpose(node: Any, importer: Any) -> relax.Var:
    """``tensor.T``: all axes reversed."""
    return importer.block_builder.emit(relax.op.permute_dims(importer.env[node.args[0]]))


def _convert_repeat(node: Any, importer: Any) -> relax.Var:
    """``aten.repeat_interleave`` with a number: each element that often along an axis."""
    named = dict(zip(("self", "repeats", "dim"), node.args, strict=False)) | dict(node.kwargs)
    x, repeats, axis = importer.env[named["self"]], named["repeats"], named.get("dim")
    emit = importer.block_builder.emit
    if axis is None:
        return emit(relax.op.repeat(x, repeats))
    return emit(relax.op.repeat(x, repeats, axis % len(x.ty.shape)))


def _convert_to(node: Any, importer: Any) -> relax.Var:
    """``aten.to`` in the overloads that name a device or a layout: only the dtype matters."""
    import torch

    x = importer.env[node.args[0]]
    wanted = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, torch.dtype)]
    if not wanted:
        return x
    dtype = str(wanted[0]).removeprefix("torch.")
    if x.ty.dtype.dtype == dtype:
        return x
    return importer.block_builder.emit(relax.op.astype(x, dtype))


def _convert_linear(node: Any, importer: Any) -> relax.Var:
    """``aten.linear``: x [..., K], weight [N, K], bias [N] or None; the result has x's dtype."""
    emit = importer.block_builder.emit
    x, weight, bias = (importer.env.get(a) for a in (*node.args, None)[:3])
    out = emit(relax.op.matmul(x, emit(relax.op.permute_dims(weight)), x.ty.dtype.dtype))
    return out if bias is None else emit(relax.op.add(out, bias))


def _product(importer: Any, x: relax.Var, y: relax.Var) -> relax.Var:
    """x y, summed in float32 and rounded to x's dtype, as torch has it."""
    emit, dtype = importer.block_builder.emit, x.ty.dtype.dtype
    if dtype not in ("float16", "bfloat16"):
        return emit(relax.op.matmul(x, y))
    return emit(relax.op.astype(emit(relax.op.matmul(x, y, "float32")), dtype))


def _convert_mm(node: Any, importer: Any) -> relax.Var:
    """``aten.mm`` and ``aten.bmm``: x [..., M, K], y [..., K, N]."""
    return _product(importer, *(importer.env[a] for a in node.args[:2]))


def _convert_addmm(node: Any, importer: Any) -> relax.Var:
    """``aten.addmm``: bias + x y, with factors of either."""
    bias, *operands = (importer.env[a] for a in node.args[:3])
    emit = importer.block_builder.emit

    def scaled(value: relax.Var, name: str) -> relax.Var:
        factor = node.kwargs.get(name, 1)
        if factor == 1:
            return value
        return emit(relax.op.multiply(value, relax.const(factor, value.ty.dtype.dtype)))

    return emit(relax.op.add(scaled(_product(importer, *operands), "alpha"), scaled(bias, "beta")))


# ---------------------------------------------------------------------------------------------
# what no single operator's converter can mend


@mutator
class WrapIndices(PyExprMutator):
    """Constant indices that count from an axis's end, which ``take`` would read before its start,
    count from its start.
    """

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if op_name(call) != "take" or call.attrs.axis is None:
            return call
        indices = (
            self.lookup_binding(call.args[1])
            if isinstance(call.args[1], relax.Var)
            else call.args[1]
        )
        if not isinstance(indices, GenericConst):
            return call
        shape, values = shape_of(call.args[0]), indices.value.numpy()
        extent = None if shape is None else static_int(shape[axis_of(call.attrs.axis, len(shape))])
        if extent is None or values.size == 0 or values.min() >= 0:
            return call
        wrapped = relax.const(np.where(values < 0, values + extent, values), str(values.dtype))
        return relax.op.take(call.args[0], wrapped, call.attrs.axis, call.attrs.mode)
