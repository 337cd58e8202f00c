"""Build one stateful function from the stateless graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import relax

from relax_passes.derive import argument
from relax_passes.graph import dtype_of, op_name, shape_of, static_int
from relax_passes.paginate.backends import Backend
from relax_passes.paginate.emitter import Emitter
from relax_passes.paginate.layers import Layer, Rows
from relax_passes.paginate.tokenwise import PaginateError, TokenAxes, variables


@dataclass(frozen=True)
class Signature:
    """The shapes of one function.

    ``tokens`` is the number of tokens fed, ``rows`` the number of tokens whose logits are wanted.
    ``pick`` says which: "all" of them, the "last" one, or those at the argument "logit_positions".
    """

    name: str
    ids_shape: tuple[Any, ...]
    tokens: Any
    rows: Any
    logits_shape: tuple[Any, ...]
    pick: str
    upper_bounds: dict[str, int]


def signatures(chunk: int, batch: int) -> list[Signature]:
    """The functions of a paginated module; bounds are for memory planning."""

    def var(name: str) -> Any:
        return tvm.tirx.Var(name, "int64")

    n, m, rows, b, v = var("n"), var("n"), var("b"), var("b"), var("n")
    return [
        Signature("prefill", (1, n), n, 1, (1, 1), "last", {"n": chunk}),
        Signature("decode", (1, 1), 1, 1, (1, 1), "all", {}),
        Signature(
            "batch_prefill", (1, m), m, rows, (1, rows), "positions", {"n": chunk, "b": batch}
        ),
        Signature("batch_decode", (b, 1), b, b, (b, 1), "all", {"b": batch}),
        Signature("batch_verify", (1, v), v, v, (1, v), "all", {"n": chunk}),
    ]


class FunctionWriter:
    """Copies the stateless graph into one function of the paginated module.

    Values after the last attention are only computed for the rows whose logits are wanted: every
    value that crosses from before the last attention to after it is cut to those rows.
    """

    def __init__(
        self,
        axes: TokenAxes,
        layers: Sequence[Layer],
        backend: Backend,
        token_input: Any,
        weights: Sequence[Any],
    ) -> None:
        self.axes = axes
        self.graph = axes.graph
        self.backend = backend
        self.token_input = token_input
        self.weights = list(weights)
        self.late = self._after(layers[-1])
        self.result = self._result()

    def _after(self, last: Layer) -> set[Any]:
        """The values that depend on the last attention."""
        late = {last.out.var}
        for var in self.axes.order:
            if any(v in late for v in _direct(self.axes, var)):
                late.add(var)
        return late

    def _result(self) -> Any:
        """The one tensor [1, S, V] the graph returns."""
        body: Any = self.graph.func.body.body
        seen = self.graph.resolve(body)
        while isinstance(seen, relax.Tuple):
            if len(seen.fields) != 1:
                raise PaginateError(
                    f"the function returns {len(seen.fields)} values; accepted is one, the logits."
                )
            body = seen.fields[0]
            seen = self.graph.resolve(body)
        if not isinstance(body, relax.Var) or len(shape_of(body) or ()) != 3:
            raise PaginateError("the function does not return logits of shape [1, S, V].")
        if self.axes.axis[body] != 1:
            raise PaginateError("the logits do not have their tokens along axis 1.")
        if body not in self.late:
            raise PaginateError("the logits do not depend on the last attention.")
        return body

    # -- one function ----------------------------------------------------------------------

    def write(self, builder: relax.BlockBuilder, signature: Signature) -> None:
        """Add the function ``signature`` describes to ``builder``."""
        ids = relax.Var("input_ids", relax.TensorType(signature.ids_shape, "int32"))
        cache = relax.Var("kv_cache", relax.AnyType())
        packed = relax.Var("params", relax.TupleType([w.ty for w in self.weights]))
        inputs = [ids]
        if signature.pick == "positions":
            inputs.append(
                relax.Var("logit_positions", relax.TensorType((signature.rows,), "int32"))
            )
        attrs: dict[str, Any] = {"num_input": len(inputs) + 1}
        if signature.upper_bounds:
            attrs["tir_var_upper_bound"] = signature.upper_bounds
        with builder.function(signature.name, [*inputs, cache, packed], attrs):
            with builder.dataflow():
                body = _Body(self, signature, Emitter(builder), inputs, cache, packed)
                logits = body.value(self.result, late=True)
                logits = body.emit.astype(logits, "float32")
                vocab = (shape_of(self.result) or [])[2]
                logits = body.emit.reshape(logits, [*signature.logits_shape, vocab])
                out = builder.emit_output(logits)
            builder.emit_func_output(out)


def _direct(axes: TokenAxes, var: Any) -> list[Any]:
    """The variables a needed variable is computed from, a layer counting as one operator."""
    layer = axes.layer_of.get(var)
    return layer.reads if layer is not None else variables(axes.graph.value[var])


class _Body:
    """The values of one function, emitted on demand in program order."""

    def __init__(
        self,
        writer: FunctionWriter,
        signature: Signature,
        emit: Emitter,
        inputs: list[Any],
        cache: Any,
        packed: Any,
    ) -> None:
        self.writer, self.signature, self.emit, self.cache = writer, signature, emit, cache
        self.inputs = inputs
        self.env: dict[Any, Any] = {}
        self.cut: dict[Any, Any] = {}
        used = {v for var in writer.axes.order for v in _direct(writer.axes, var)}
        for n, weight in enumerate(writer.weights):
            if weight in used:
                self.env[weight] = emit.emit(relax.TupleGetItem(packed, n))
        token = writer.token_input
        flat = emit.reshape(inputs[0], [1, signature.tokens])
        self.env[token] = emit.astype(flat, dtype_of(token))
        self._positions: Any = None
        for var in writer.axes.order:
            self.env[var] = self._emit(var)

    def value(self, var: Any, *, late: bool) -> Any:
        """What ``var`` became; cut to the wanted rows for a reader after the last attention."""
        found = self.env[var]
        if not late or var in self.writer.late:
            return found
        axis = self.writer.axes.axis.get(var)
        if axis is None:
            return found
        if var not in self.cut:
            self.cut[var] = self._pick(found, axis)
        return self.cut[var]

    def positions(self) -> Any:
        """int32 [tokens]: where each token stands in its own sequence."""
        if self._positions is None:
            backend, tokens = self.writer.backend, self.signature.tokens
            self._positions = self.emit.emit(backend.query_positions(self.cache, tokens))
        return self._positions

    def _pick(self, x: Any, axis: int) -> Any:
        signature = self.signature
        if signature.pick == "all":
            return x
        if signature.pick == "last":
            last = signature.tokens - 1
            return self.emit.emit(
                relax.op.strided_slice(x, [axis], [last], [signature.tokens], assume_inbound=True)
            )
        return self.emit.emit(relax.op.take(x, self.inputs[1], axis=axis, mode="clip"))

    def _emit(self, var: Any) -> Any:
        axes = self.writer.axes
        layer = axes.layer_of.get(var)
        if layer is not None:
            return self._layer(layer, late=var in self.writer.late)
        if var in axes.positions:
            # The tokens are numbered: the cache knows where they really stand.
            shape = [self._dim(d, self.signature.tokens) for d in shape_of(var) or []]
            numbers = self.emit.astype(self.positions(), dtype_of(var))
            offset = axes.positions[var]
            if offset:
                numbers = self.emit.emit(relax.op.add(numbers, relax.const(offset, dtype_of(var))))
            return self.emit.reshape(numbers, shape)
        late = var in self.writer.late
        count = self.signature.rows if late else self.signature.tokens
        return self.emit.emit(self._copy(axes.graph.value[var], late, count))

    def _copy(self, expr: Any, late: bool, count: Any) -> Any:
        """``expr`` with its variables replaced and the sequence length turned into ``count``."""
        if isinstance(expr, relax.Var):
            if tvm.ir.is_prim_var(expr):
                return self._dim(expr, count)
            return self.value(expr, late=late)
        if isinstance(expr, relax.Call):
            if op_name(expr) == "strided_slice":
                return self._slice(expr, late, count)
            args = [self._copy(a, late, count) for a in expr.args]
            if op_name(expr) == "take" and expr.attrs.mode == "fast":
                # An index out of range would read anywhere; "clip" costs a comparison.
                return relax.op.take(*args, axis=expr.attrs.axis, mode="clip")
            return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._copy(f, late, count) for f in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._copy(expr.tuple_value, late, count), expr.index)
        if isinstance(expr, relax.ShapeExpr):
            return relax.ShapeExpr([self._dim(d, count) for d in expr.values])
        if tvm.ir.is_prim_expr(expr):
            return self._dim(expr, count)
        return expr

    def _slice(self, call: relax.Call, late: bool, count: Any) -> Any:
        args = [self._copy(call.args[0], late, count), *call.args[1:]]
        ends = [self._dim(e, count) for e in call.args[3].fields]
        args[3] = relax.Tuple([relax.prim_value(e) for e in ends])
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _dim(self, dim: Any, count: Any) -> Any:
        if static_int(dim) is not None or isinstance(dim, tvm.tirx.FloatImm):
            return dim
        if self.writer.axes.is_length(dim):
            return count
        raise PaginateError(f"the graph computes with the sequence length ({dim}).")

    def _layer(self, layer: Layer, *, late: bool) -> Any:
        q, k, v = (self._rows(rows) for rows in (layer.q, layer.k, layer.v))
        values = [
            argument(self.emit.emit, replace(v, value=self.env.get(v.value, v.value)))
            for v in layer.values
        ]
        out = self.writer.backend.attention(self.emit, self.cache, layer, q, k, v, values)
        tokens = self.signature.tokens
        if late:
            out, tokens = self._pick(out, 0), self.signature.rows
        if layer.out.order == "BHS":
            out = self.emit.permute(out, [1, 0, 2])
        shape = [self._dim(d, tokens) for d in shape_of(layer.out.var) or []]
        return self.emit.astype(self.emit.reshape(out, shape), layer.out.dtype)

    def _rows(self, rows: Rows) -> Any:
        """[tokens, row], whatever axes the graph has before the tokens."""
        x = self.env[rows.tensor]
        rank = len(shape_of(rows.tensor) or ())
        x = self.emit.permute(x, [rows.axis, *(n for n in range(rank) if n != rows.axis)])
        return self.emit.reshape(x, [self.signature.tokens, rows.size])
