"""What looks like attention in a graph: a softmax between two products.

The walk is generous, so that nothing attention-shaped is missing from the report: it passes through
operators that mix keys, or change the weights after the softmax, which the proof (recognize.py)
then names as the reason why a site is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import relax

from relax_passes.elements import ELEMENTWISE
from relax_passes.graph import Graph, op_name, shape_of, static_int

ATTENTION_OPS = ("nn.attention", "nn.attention_bias", "nn.attention_var_len")
SOFTMAX_OPS = frozenset(["nn.softmax", "nn.log_softmax"])
LAYOUT_OPS = frozenset(
    [
        "permute_dims",
        "reshape",
        "expand_dims",
        "squeeze",
        "broadcast_to",
        "flatten",
        "astype",
        "repeat",
    ]
)
#: What a safe softmax puts between the weights and the values.
_SAFE_OPS = frozenset(["where", "full_like"])
DROPOUT = "nn.dropout"
#: Operators whose result is made of several of their input's elements, or of some of them.
_MIXING_OPS = frozenset(
    [
        "concat",
        "cumprod",
        DROPOUT,
        "cumsum",
        "dynamic_strided_slice",
        "einsum",
        "flip",
        "gather_elements",
        "index_tensor",
        "layout_transform",
        "max",
        "mean",
        "min",
        "nn.layer_norm",
        "nn.pad",
        "nn.rms_norm",
        "prod",
        "scatter_elements",
        "slice_scatter",
        "sort",
        "split",
        "stack",
        "std",
        "strided_slice",
        "sum",
        "take",
        "tile",
        "topk",
        "tril",
        "triu",
        "variance",
    ]
)
#: Walks end after so many operators: what is farther away is not this attention's.
_LIMIT = 400


@dataclass(frozen=True)
class Anchor:
    """A softmax, the products whose result it reads, and the product that reads its result.

    ``chain`` holds the variables from the softmax to ``product``; ``through`` the operators among
    them that are not only layout.
    """

    binding: relax.VarBinding
    scores: list[Any]
    product: Any
    chain: set[Any]
    through: list[str]


def find_anchor(graph: Graph, binding: relax.VarBinding) -> Anchor | None:
    """The softmax ``binding`` as an anchor; None where a product is missing on either side.

    One product alone (a router, a classifier's head) is no attention.
    """
    scores = score_products(graph, binding.value.args[0])
    if not scores:
        return None
    chain, through, product = _forward(graph, binding.var)
    return None if product is None else Anchor(binding, scores, product, chain, through)


def score_products(graph: Graph, expr: Any) -> list[Any]:
    """The matmul variables an expression reaches, those nearest to it first."""
    found: list[Any] = []
    seen: set[Any] = set()
    queue = [expr]
    while queue and len(seen) < _LIMIT:
        var = queue.pop(0)
        if not isinstance(var, relax.Var) or var in seen:
            continue
        seen.add(var)
        value: Any = graph.value.get(var)
        if isinstance(value, relax.Var):
            queue.append(value)
        elif isinstance(value, relax.TupleGetItem):
            queue.append(value.tuple_value)
        elif isinstance(value, relax.Tuple):
            queue.extend(value.fields)
        elif op_name(value) == "matmul":
            found.append(var)
        elif op_name(value) in ELEMENTWISE | LAYOUT_OPS | _MIXING_OPS:
            for arg in value.args:
                queue.extend(arg.fields if isinstance(arg, relax.Tuple) else [arg])
    return found


def _forward(graph: Graph, softmax: Any) -> tuple[set[Any], list[str], Any]:
    """The variables from a softmax to the first product they enter, what they pass through, and
    that product.
    """
    live = graph.live()
    size = _size(softmax)
    chain, queue, product = {softmax}, [softmax], None
    through: list[str] = []
    while queue and len(chain) < _LIMIT:
        current = queue.pop(0)
        for user in graph.users[current]:
            if user not in live or user in chain:
                continue
            value = graph.value[user]
            name = op_name(value)
            if name == "matmul":
                product = user if product is None else product
                continue
            if name in LAYOUT_OPS | _SAFE_OPS or isinstance(value, relax.Var | relax.TupleGetItem):
                pass
            elif name in _MIXING_OPS | SOFTMAX_OPS or (name in ELEMENTWISE and _size(user) == size):
                # An element-wise operator that makes more of it is no longer about weights.
                through.append(name)
            else:
                continue
            chain.add(user)
            queue.append(user)
    return chain, through, product


def _size(var: Any) -> Any:
    """Elements of a tensor, as far as they are known."""
    count, symbols = 1, []
    for extent in shape_of(var) or ():
        number = static_int(extent)
        if number is None:
            symbols.append(str(extent))
        else:
            count *= number
    return count, sorted(symbols)


def nested_graphs(func: relax.Function) -> Iterator[tuple[str, Graph]]:
    """Every branch and inner function of ``func``, with what it is inside of."""
    stack: list[tuple[str, Any]] = [("", func.body)]
    while stack:
        where, body = stack.pop()
        if where:
            yield where, Graph(SimpleNamespace(body=body))
        for block in getattr(body, "blocks", ()):
            for binding in block.bindings:
                value = binding.value
                if isinstance(value, relax.If):
                    stack += [("a conditional", value.true_branch)]
                    stack += [("a conditional", value.false_branch)]
                elif isinstance(value, relax.Function):
                    stack.append(("a nested function", value.body))


def mixing_operator(graph: Graph, expr: Any) -> str:
    """The operator nearest to ``expr``, on its way to a product, that reads several elements."""
    queue: list[Any] = [expr]
    seen: set[Any] = set()
    while queue and len(seen) < _LIMIT:
        var = queue.pop(0)
        if not isinstance(var, relax.Var) or var in seen:
            continue
        seen.add(var)
        value: Any = graph.value.get(var)
        name = op_name(value)
        if name in _MIXING_OPS and score_products(graph, var):
            return name
        if isinstance(value, relax.Var):
            queue.append(value)
        elif isinstance(value, relax.TupleGetItem):
            queue.append(value.tuple_value)
        elif name in ELEMENTWISE | LAYOUT_OPS:
            queue.extend(value.args)
    return ""
