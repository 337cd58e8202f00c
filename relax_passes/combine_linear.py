"""Linear layers that read the same input become one, their weights stacked at compile time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relax_passes.graph import Graph, dtype_of, op_name, permutation, shape_of, static_int


@dataclass(frozen=True)
class _Linear:
    """``result = x @ weight^T (+ bias)`` with parameters nobody else reads."""

    product: Any
    result: Any
    x: Any
    weight: Any
    bias: Any
    width: int


def combine_parallel_linears(
    module: tvm.IRModule, params: dict[str, np.ndarray], func: str = "main"
) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Stack the weights of linear layers with one input, as of q, k, v and of gate and up.

    Each linear layer wakes all threads, which a decoding step, with its small matrices, feels.

    Before::

        q = R.matmul(x, R.permute_dims(wq)); k = R.matmul(x, R.permute_dims(wk))

    After::

        qk = R.matmul(x, R.permute_dims(wq_wk))
        q = R.strided_slice(qk, [2], [0], [Nq]); k = R.strided_slice(qk, [2], [Nq], [Nq + Nk])

    Parameters
    ----------
    module, func
        ``func`` takes its inputs first (attribute ``num_input``) and then ``params`` in their
        order.
    params
        The weights by name, [N, K] each, as ``torch.nn.Linear`` keeps them.

    Returns
    -------
    The module with fewer parameters, and its parameters in order; a stacked one is named by the
    names of its parts, joined by ``+``.  Both are new; the arguments are unchanged.
    """
    main = module[func]
    inputs = int(main.attrs["num_input"])
    names = dict(zip(main.params[inputs:], params, strict=True))
    groups = [g for g in _groups(Graph(main), set(names)) if len(g) > 1]
    if not groups:
        return module, params
    stacks: dict[Any, tuple[Any, list[Any]]] = {}
    for group in groups:
        for parts in ([g.weight for g in group], [g.bias for g in group]):
            if parts[0] is not None:
                stacks[parts[0]] = (_stacked(parts), parts)
    merged = {part for _, parts in stacks.values() for part in parts}
    new_params = list(main.params[:inputs])
    arrays: dict[str, np.ndarray] = {}
    for var, name in names.items():
        if var in stacks:
            stacked, parts = stacks[var]
            new_params.append(stacked)
            pieces = [params[names[part]] for part in parts]
            arrays["+".join(names[part] for part in parts)] = np.concatenate(pieces)
        elif var not in merged:
            new_params.append(var)
            arrays[name] = params[name]
    body = _Rewriter(module, groups, {k: v[0] for k, v in stacks.items()}).visit_expr(main)
    body = relax.analysis.remove_all_unused(body)
    result = module.clone()
    result[func] = relax.Function(
        new_params, body.body, main.ret_ty, main.is_pure, main.attrs, main.span
    )
    return result, arrays


def _groups(graph: Graph, params: set[Any]) -> list[list[_Linear]]:
    """Linear layers by input, in the order of the graph."""
    live = graph.live()
    found: dict[Any, list[_Linear]] = defaultdict(list)
    for binding in graph.bindings:
        linear = _match(graph, binding.var, params, live) if binding.var in live else None
        if linear is not None:
            key = (linear.x, dtype_of(linear.result), linear.bias is None)
            found[key].append(linear)
    return list(found.values())


def _match(graph: Graph, var: Any, params: set[Any], live: Set[Any]) -> _Linear | None:
    call = graph.value[var]
    if op_name(call) != "matmul" or dtype_of(call) != dtype_of(call.args[0]):
        return None
    x, transposed = call.args
    turned = graph.value.get(transposed)
    if not isinstance(var, relax.DataflowVar):
        return None
    if not isinstance(x, relax.Var) or op_name(turned) != "permute_dims":
        return None
    assert turned is not None
    weight = turned.args[0]
    shape = shape_of(weight) or []
    if weight not in params or len(shape) != 2 or permutation(turned, 2) != [1, 0]:
        return None
    width = static_int(shape[0])
    if width is None or not (_once(graph, weight, live) and _once(graph, transposed, live)):
        return None
    readers = [u for u in graph.users[var] if u in live]
    if len(readers) == 1 and op_name(graph.value[readers[0]]) == "add":
        a, b = graph.value[readers[0]].args
        bias = b if a.same_as(var) else a
        if not isinstance(readers[0], relax.DataflowVar):
            return _Linear(var, var, x, weight, None, width)
        if bias in params and len(shape_of(bias) or ()) == 1 and _once(graph, bias, live):
            return _Linear(var, readers[0], x, weight, bias, width)
    return _Linear(var, var, x, weight, None, width)


def _once(graph: Graph, var: Any, live: Set[Any]) -> bool:
    return len([u for u in graph.users[var] if u in live]) == 1 and var not in graph.outputs


def _stacked(parts: list[Any]) -> Any:
    """A parameter that holds ``parts`` one after the other along the first axis."""
    rows = sum(int(part.ty.shape[0]) for part in parts)
    shape = [rows, *list(parts[0].ty.shape)[1:]]
    return relax.Var(
        "_".join(part.name for part in parts), relax.TensorType(shape, parts[0].ty.dtype)
    )


@mutator
class _Rewriter(PyExprMutator):
    def __init__(
        self, module: tvm.IRModule, groups: list[list[_Linear]], stacked: dict[Any, Any]
    ) -> None:
        super().__init__(module)
        self.stacked = stacked
        self.first = {group[0].product: group for group in groups}
        self.pieces: dict[Any, Any] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.first:
            self._emit(self.first[binding.var])
        if binding.var in self.pieces:
            self.set_var_remap(binding.var, self.pieces[binding.var])
        else:
            super().visit_var_binding_(binding)

    def _emit(self, group: list[_Linear]) -> None:
        """All layers of a group, where the first one stands."""
        emit = self.builder_.emit
        first = group[0]
        weight = emit(relax.op.permute_dims(self.stacked[first.weight]))
        out = emit(relax.op.matmul(self.visit_expr(first.x), weight, dtype_of(first.result)))
        if first.bias is not None:
            out = emit(relax.op.add(out, self.stacked[first.bias]))
        axis = len(shape_of(out) or ()) - 1
        begin = 0
        for linear in group:
            end = begin + linear.width
            self.pieces[linear.result] = emit(
                relax.op.strided_slice(out, [axis], [begin], [end], assume_inbound=True)
            )
            begin = end
