"""What an exported function takes, and the same function of token ids alone.

A stateless model may also take positions, a mask of ones, and past keys and values.  All of these
say where a sequence stands; once the function is stateful the KV cache knows that.  So they are
bound first: positions to ``arange``, masks to ``ones``, and the past to nothing, which leaves the
full-sequence forward that everything else is proven on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from relax_passes.graph import Graph, axis_of, dtype_of, is_float, is_one, op_name, shape_of
from relax_passes.paginate.tokenwise import PaginateError


@dataclass(frozen=True)
class Inputs:
    """The inputs of a function by what they are; weights are not among them."""

    token: Any
    positions: tuple[Any, ...]
    ones: tuple[Any, ...]
    past: tuple[Any, ...]
    weights: tuple[Any, ...]

    @property
    def length(self) -> Any:
        """The symbolic number of tokens."""
        return sequence_length(self.token)


def sequence_length(token: Any) -> Any:
    """S of the token input [1, S]."""
    shape = shape_of(token)
    if shape is None or len(shape) != 2 or not is_one(shape[0]):
        raise PaginateError(f"the token input {token.name!r} does not have the shape [1, S].")
    if not tvm.ir.is_prim_var(shape[1]):
        raise PaginateError(
            f"the token input {token.name!r} has a fixed length; "
            "export the model with a dynamic sequence length."
        )
    return shape[1]


def read_inputs(
    func: relax.Function,
    token_input: str | None,
    position_inputs: Sequence[str],
    all_ones_inputs: Sequence[str],
) -> Inputs:
    """Tell the inputs of ``func`` apart; ``num_input`` says how many come before the weights.

    Raises
    ------
    PaginateError
        A name is no input's, or an input is none of these.
    """
    count = 1
    if func.attrs is not None and "num_input" in func.attrs:
        count = int(func.attrs["num_input"])
    inputs, weights = list(func.params[:count]), tuple(func.params[count:])
    if not inputs:
        raise PaginateError("the function has no input.")
    by_name = {v.name: v for v in inputs}
    for name in [
        *([token_input] if token_input else []),
        *position_inputs,
        *all_ones_inputs,
    ]:
        if name not in by_name:
            raise PaginateError(f"there is no input {name!r}; the inputs are {', '.join(by_name)}.")
    token = by_name[token_input] if token_input else inputs[0]
    positions = tuple(by_name[n] for n in position_inputs)
    ones = tuple(by_name[n] for n in all_ones_inputs)
    length = sequence_length(token)
    past = []
    for var in inputs:
        if any(var.same_as(known) for known in (token, *positions, *ones)):
            continue
        if not _is_past(var, length):
            raise PaginateError(
                f"the input {var.name!r} is neither token ids, nor positions, nor all ones, nor "
                "past keys or values (name it in position_inputs or all_ones_inputs)."
            )
        past.append(var)
    return Inputs(token, positions, ones, tuple(past), weights)


def _is_past(var: Any, length: Any) -> bool:
    """A floating-point tensor with one symbolic axis that is not the sequence length."""
    shape = shape_of(var) or []
    symbolic = [d for d in shape if tvm.ir.is_prim_var(d) and not d.same_as(length)]
    return len(shape) >= 3 and len(symbolic) == 1 and is_float(dtype_of(var))


def bind_inputs(func: relax.Function, inputs: Inputs) -> relax.Function:
    """``func`` as a function of its token ids and weights alone, which returns its logits alone.

    Before::

        def main(input_ids: Tensor[(1, S)], attention_mask: Tensor[(1, P + S)],
                 past_k: Tensor[(1, H, P, D)], ..., w0, ...):
            k_all = R.concat((past_k, k), axis=2)
            ...
            return (logits, k_all, ...)

    After::

        def main(input_ids: Tensor[(1, S)], w0, ...):
            attention_mask = R.ones((1, S), "int64")
            ...
            return logits
    """
    names = [v.name for v in inputs.past]
    if inputs.past:
        func = _without_past(func, inputs)
        inputs = _renew(func, inputs)
    length = inputs.length
    builder = relax.BlockBuilder()
    bindings = []
    for var in inputs.ones:
        value = relax.op.ones(shape_of(var), dtype_of(var))
        bindings.append(relax.VarBinding(var, builder.normalize(value)))
    for var in inputs.positions:
        shape = shape_of(var) or []
        if [n for n in shape if not is_one(n)] != [length]:
            raise PaginateError(
                f"the input {var.name!r} does not have one position for each token."
            )
        numbers = relax.Var("positions", relax.TensorType((length,), dtype_of(var)))
        count = relax.op.arange(0, length, 1, dtype_of(var))
        bindings.append(relax.VarBinding(numbers, builder.normalize(count)))
        shaped = relax.op.reshape(numbers, shape)
        bindings.append(relax.VarBinding(var, builder.normalize(shaped)))
    blocks = list(func.body.blocks)
    if bindings:
        blocks.insert(0, relax.BindingBlock(bindings))
    result = func.body.body
    if inputs.past:
        blocks, result = _drop_past(func, blocks, inputs, names)
    made = relax.Function(
        [inputs.token, *inputs.weights],
        relax.SeqExpr(blocks, result),
        result.ty,
        func.is_pure,
        func.attrs,
    )
    return made.with_attr("num_input", 1)


def _without_past(func: relax.Function, inputs: Inputs) -> relax.Function:
    """``func`` for an empty past: what its axis is counted with becomes 0."""
    length = inputs.length
    zero = tirx.IntImm("int64", 0)
    empty = {d: zero for v in inputs.past for d in shape_of(v) or () if _symbol(d, length)}
    # A mask over past and new tokens may count them together.
    total = {
        d: length
        for v in inputs.ones
        for d in shape_of(v) or ()
        if _symbol(d, length) and not any(d.same_as(e) for e in empty)
    }
    return func.bind_symbolic_vars({**empty, **total})


def _symbol(dim: Any, length: Any) -> bool:
    return tvm.ir.is_prim_var(dim) and not dim.same_as(length)


def _renew(func: relax.Function, inputs: Inputs) -> Inputs:
    """The same inputs in a function whose parameters are new variables."""
    by_name = {v.name: v for v in func.params}

    def new(variables: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(by_name[v.name] for v in variables)

    return Inputs(
        by_name[inputs.token.name],
        new(inputs.positions),
        new(inputs.ones),
        new(inputs.past),
        new(inputs.weights),
    )


def _drop_past(
    func: relax.Function, blocks: list[Any], inputs: Inputs, names: Sequence[str]
) -> tuple[list[Any], Any]:
    """Take empty pasts out of what they are concatenated with, and the new ones from the result."""
    graph = Graph(func)
    made = []
    for block in blocks:
        bindings = []
        for binding in block.bindings:
            value = binding.value
            fields = graph.resolve(value.args[0]) if op_name(value) == "concat" else None
            if isinstance(fields, relax.Tuple):
                axis = axis_of(value.attrs.axis, len(shape_of(binding.var) or ()))
                kept = [f for f in fields.fields if not _is_empty(f, axis)]
                if len(kept) == 1 and len(kept) < len(fields.fields):
                    binding = relax.VarBinding(binding.var, kept[0])
            bindings.append(binding)
        dataflow = isinstance(block, relax.DataflowBlock)
        made.append((relax.DataflowBlock if dataflow else relax.BindingBlock)(bindings))
    result = graph.resolve(func.body.body)
    fields = list(result.fields) if isinstance(result, relax.Tuple) else []
    logits = [f for f in fields if len(shape_of(f) or ()) == 3]
    if len(logits) != 1 or len(fields) not in (1, 1 + len(names)):
        raise PaginateError(
            f"the function takes the past {', '.join(names)} and returns {max(1, len(fields))} "
            "values; accepted are the logits of shape [1, S, V], alone or with as many new keys "
            "and values."
        )
    # The logits may be a plain dataflow variable, which only its block can name.
    out = relax.Var("logits", logits[0].ty)
    last = made[-1]
    made[-1] = type(last)([*last.bindings, relax.VarBinding(out, logits[0])])
    body = relax.Function(
        [inputs.token, *inputs.weights, *inputs.past, *inputs.ones, *inputs.positions],
        relax.SeqExpr(made, out),
        out.ty,
        func.is_pure,
    )
    live = Graph(body).live()
    for var, name in zip(inputs.past, names, strict=True):
        if var in live:
            raise PaginateError(
                f"the past {name!r} is read by something else than a concatenation with new keys "
                "or values along its symbolic axis."
            )
    return made, out


def _is_empty(expr: Any, axis: int) -> bool:
    shape = shape_of(expr)
    return shape is not None and isinstance(shape[axis], tirx.IntImm) and int(shape[axis]) == 0
