"""What is attention is found with its scale, heads and layout; what only looks like it is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graphs import (
    DIM,
    HEADS,
    SEQ,
    Graph,
    build,
    causal_attention,
    indices,
    masked,
    qkv,
    scores,
    tensor,
)
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from relax_passes.recognize import find_sites


def sites_of(body: Any, *params: relax.Var) -> list[Any]:
    return find_sites(build(body, *params))


# ---------------------------------------------------------------------------------------------
# forms


def test_written_out() -> None:
    (site,) = sites_of(causal_attention, *qkv())
    assert site.recognised, site.reason
    assert (site.form, site.variant, site.mask.describe()) == ("B", "softmax", "causal")
    assert site.scale == 1 / math.sqrt(DIM)
    assert [o.tensor.name for o in site.operands] == ["q", "k", "v"]
    assert (site.num_qo_heads, site.head_dim) == (HEADS, DIM)


def test_scale_on_both_sides() -> None:
    root = relax.const(DIM**-0.25, "float32")

    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        raw = g.matmul(g.multiply(q, root), g.multiply(g.permute_dims(k, [0, 1, 3, 2]), root))
        return g.matmul(g.softmax(raw), v)

    (site,) = sites_of(body, *qkv())
    assert site.recognised, site.reason
    assert site.scale == 1 / math.sqrt(DIM)
    assert [o.tensor.name for o in site.operands] == ["q", "k", "v"]


def test_grouped_heads_are_recovered() -> None:
    def expand(g: Graph, x: relax.Var) -> relax.Var:
        wide = g.broadcast_to(g.expand_dims(x, 2), [1, 2, 2, SEQ, DIM])
        return g.reshape(wide, [1, 4, SEQ, DIM])

    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        return causal_attention(g, q, expand(g, k), expand(g, v))

    (site,) = sites_of(body, *qkv(kv_heads=2))
    assert site.recognised, site.reason
    assert [o.tensor.name for o in site.operands] == ["q", "k", "v"]
    assert [o.heads for o in site.operands] == [4, 2, 2]


def test_interleaved_heads_are_not_taken_for_groups() -> None:
    """Head h of q with head h % 2 of k (``tile``, not ``repeat_interleave``)."""

    def expand(g: Graph, x: relax.Var) -> relax.Var:
        wide = g.broadcast_to(g.expand_dims(x, 1), [1, 2, 2, SEQ, DIM])
        return g.reshape(wide, [1, 4, SEQ, DIM])

    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        return causal_attention(g, q, expand(g, k), expand(g, v))

    (site,) = sites_of(body, *qkv(kv_heads=2))
    assert site.recognised, site.reason
    # Not recovered: the keys stay the expanded tensor with one head per query head.
    assert [o.heads for o in site.operands] == [4, 4, 4]
    assert site.operands[1].tensor.name != "k"


def test_token_major_operands_are_reached() -> None:
    params = [tensor(n, 1, SEQ, HEADS, DIM) for n in "qkv"]

    def body(g: Graph, *xs: relax.Var) -> relax.Var:
        q, k, v = (g.permute_dims(x, [0, 2, 1, 3]) for x in xs)
        return g.permute_dims(causal_attention(g, q, k, v), [0, 2, 1, 3])

    (site,) = sites_of(body, *params)
    assert site.recognised, site.reason
    assert [o.tensor.name for o in site.operands] == ["q", "k", "v"]
    assert [int(o.token) for o in site.operands] == [HEADS * DIM] * 3


def test_nn_attention() -> None:
    params = [tensor(n, 1, SEQ, HEADS, DIM) for n in "qkv"]
    (site,) = sites_of(
        lambda g, q, k, v: g.attention(q, k, v, scale=0.25, causal_mask="TopLeft"), *params
    )
    assert site.recognised, site.reason
    assert (site.form, site.scale, site.mask.describe()) == ("G", 0.25, "causal")


def test_soft_cap() -> None:
    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        cap = relax.const(30.0, "float32")
        x = g.multiply(g.tanh(g.divide(scores(g, q, k), cap)), cap)
        query, key = indices(g)
        return g.matmul(g.softmax(masked(g, x, g.less_equal(key, query))), v)

    (site,) = sites_of(body, *qkv())
    assert site.recognised, site.reason
    assert (site.form, site.mask.describe()) == ("C", "causal")
    assert site.soft_cap == pytest.approx(30.0)
    assert site.scale == pytest.approx(1 / math.sqrt(DIM))


def test_bias() -> None:
    bias = tensor("bias", 1, HEADS, SEQ, SEQ)

    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var, b: relax.Var) -> relax.Var:
        return g.matmul(g.softmax(g.add(scores(g, q, k), b)), v)

    (site,) = sites_of(body, *qkv(), bias)
    assert site.recognised, site.reason
    assert (site.form, site.variant, site.mask.describe()) == ("D", "softmax+bias", "none")


def imported(module: torch.nn.Module, *args: torch.Tensor, dynamic: Any = None) -> relax.Function:
    with torch.no_grad():
        program = torch.export.export(module.eval(), args, dynamic_shapes=dynamic)
    return from_exported_program(program, keep_params_as_input=True)["main"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torch_sdpa_decomposed(dtype: torch.dtype) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

    args = [torch.zeros(1, heads, 12, 16, dtype=dtype) for heads in (4, 2, 2)]
    (site,) = find_sites(imported(Attention(), *args))
    assert site.recognised, site.reason
    assert (site.form, site.mask.describe(), site.scale) == ("A", "causal", 0.25)
    assert [o.tensor.name for o in site.operands] == ["q", "k", "v"]
    assert (site.num_qo_heads, site.num_kv_heads) == (4, 2)


def test_multihead_attention_module() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.inner(x, x, x, need_weights=True, average_attn_weights=False)[0]

    (site,) = find_sites(imported(Attention(), torch.zeros(1, 12, 32)))
    assert site.recognised, site.reason
    assert site.mask.describe() == "none"
    assert (site.num_qo_heads, site.head_dim) == (4, 8)
    assert site.scale == pytest.approx(1 / math.sqrt(8))


# ---------------------------------------------------------------------------------------------
# look-alikes


def test_softmax_over_the_queries() -> None:
    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        return g.matmul(g.softmax(scores(g, q, k), axis=-2), v)

    (site,) = sites_of(body, *qkv(length=12))
    assert "another axis" in site.reason


def test_weights_also_returned() -> None:
    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> tuple[relax.Var, relax.Var]:
        weights = g.softmax(scores(g, q, k))
        return g.matmul(weights, v), weights

    (site,) = sites_of(body, *qkv())
    assert "also returned" in site.reason


def test_scores_used_elsewhere() -> None:
    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> tuple[relax.Var, relax.Var]:
        x = scores(g, q, k)
        return g.matmul(g.softmax(x), v), g.sum(x)

    (site,) = sites_of(body, *qkv())
    assert "returned" in site.reason or "elsewhere" in site.reason


def test_mask_from_the_scores() -> None:
    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        x = scores(g, q, k)
        keep = g.greater(x, relax.const(0.0, "float32"))
        x = g.where(keep, x, relax.const(-math.inf, "float32"))
        return g.matmul(g.softmax(x), v)

    (site,) = sites_of(body, *qkv())
    assert not site.recognised


def test_mask_below_a_tanh() -> None:
    """tanh makes -1 of -inf: such a key is not hidden."""

    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        query, key = indices(g)
        x = g.tanh(masked(g, scores(g, q, k), g.less_equal(key, query)))
        return g.matmul(g.softmax(x), v)

    (site,) = sites_of(body, *qkv())
    assert "below a tanh" in site.reason


def test_scores_turned_round() -> None:
    """-(scores + mask) would show what the mask hides."""

    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        query, key = indices(g)
        x = masked(g, scores(g, q, k), g.less_equal(key, query))
        return g.matmul(g.softmax(g.multiply(x, relax.const(-1.0, "float32"))), v)

    (site,) = sites_of(body, *qkv())
    assert "not positive" in site.reason


def test_one_query_head_for_all() -> None:
    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        return causal_attention(g, g.broadcast_to(q, [1, HEADS, SEQ, DIM]), k, v)

    _, k, v = qkv()
    (site,) = sites_of(body, tensor("q", 1, 1, SEQ, DIM), k, v)
    assert not site.recognised or site.num_qo_heads == HEADS


def test_scores_that_meet_other_keys() -> None:
    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        return g.matmul(g.softmax(g.cumsum(scores(g, q, k), axis=-1)), v)

    assert not any(site.recognised for site in sites_of(body, *qkv()))


def test_unknown_function_of_the_scores() -> None:
    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        return g.matmul(g.softmax(g.exp(scores(g, q, k))), v)

    (site,) = sites_of(body, *qkv())
    assert site.recognised, site.reason
    assert site.variant == "softmax+element-wise"


def test_scaled_after_softmax() -> None:
    def body(g: Graph, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Var:
        weights = g.where(
            g.greater(g.softmax(scores(g, q, k)), relax.const(0.1, "float32")),
            g.softmax(scores(g, q, k)),
            relax.const(0.0, "float32"),
        )
        return g.matmul(weights, v)

    assert not any(site.recognised for site in sites_of(body, *qkv()))


def test_a_softmax_alone_is_no_attention() -> None:
    x, w = tensor("x", 1, SEQ, 32), tensor("w", 32, 8)
    assert sites_of(lambda g, x, w: g.softmax(g.matmul(x, w)), x, w) == []
