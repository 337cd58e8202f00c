"""Sinks: one more logit in the softmax of each row, whose weight no value is multiplied with.

gpt-oss learns one for each head; Xiao et al., 2023, "Efficient Streaming Language Models with
Attention Sinks", section 3.3, has it as a learnable sink token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx

from relax_passes.elements import Element, ElementView
from relax_passes.graph import Graph, axis_of, is_one, op_name, shape_of


def split_sink(
    view: ElementView, source: Any, index: Sequence[Any], axis: int, length: Any
) -> tuple[Any, int, Element] | None:
    """A softmax's input that is ``concat`` of scores and a sink along ``axis``.

    Returns the scores, their first column, and the sink of the row at ``index``; None where the
    input is something else. What the row is less its maximum is the same to a softmax.
    """
    joined = view.graph.resolve(_without_maximum(view.graph, source, axis))
    if op_name(joined) != "concat" or joined.attrs.axis is None:
        return None
    fields = view.graph.resolve(joined.args[0])
    if not isinstance(fields, relax.Tuple) or len(fields.fields) != 2:
        return None
    if axis_of(joined.attrs.axis, len(index)) != axis:
        return None
    for first in (0, 1):
        scores, sink = fields.fields[first], fields.fields[1 - first]
        shapes = shape_of(scores), shape_of(sink)
        if not shapes[0] or not shapes[1]:
            return None
        if view.same(shapes[0][axis], length) and is_one(shapes[1][axis]):
            zero = tirx.IntImm("int64", 0)
            return scores, first, view.at(sink, (*index[:axis], zero, *index[axis + 1 :]))
    return None


def _without_maximum(graph: Graph, source: Any, axis: int) -> Any:
    """x of ``x - max(x)``, or ``source``."""
    value = graph.resolve(source)
    if op_name(value) != "subtract":
        return source
    x, most = value.args
    made = graph.resolve(most)
    if isinstance(made, relax.TupleGetItem) and made.index == 0:
        made = graph.resolve(made.tuple_value)
    rank = len(shape_of(x) or ())
    if op_name(made) == "topk":
        axes = [made.attrs.axis] if int(made.attrs.k) == 1 and made.attrs.largest else []
    elif op_name(made) == "max" and made.attrs.keepdims:
        axes = list(made.attrs.axis or [])
    else:
        return source
    over = [axis_of(a, rank) for a in axes]
    return x if over == [axis] and graph.resolve(made.args[0]) is graph.resolve(x) else source
