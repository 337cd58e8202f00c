"""What looks like attention is left alone with its reason; what is attention in disguise is found.

Every case is a function of torch, exported and imported as a user would; its own result in PyTorch
is what a rewritten graph must give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from tvm_ffi import structural_equal

from relax_passes.inject import InjectAttention
from relax_passes.report import Report, SiteReport
from relax_passes.targets import resolve_target

B, H, S, D = 2, 4, 12, 16
Function = Callable[..., Any]
#: function: (reason of every site, extra inputs)
LEFT: dict[Function, tuple[str, tuple[Any, ...]]] = {}
#: function: ((variant, mask, KV heads), extra inputs, whether its kernel is one that others share)
REWRITTEN: dict[Function, tuple[tuple[str, str, int], tuple[Any, ...], bool]] = {}


def left_alone(reason: str, *extra: Any) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        LEFT[function] = (reason, extra)
        return function

    return register


def rewritten(
    variant: str = "softmax", mask: str = "none", *extra: Any, kv_heads: int = H
) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        shared = (variant, mask) == ("softmax", "none")
        REWRITTEN[function] = ((variant, mask, kv_heads), extra, shared)
        return function

    return register


def scores(q: Any, k: Any) -> Any:
    return q @ k.transpose(-1, -2) * 0.25


def attend(x: Any, v: Any) -> Any:
    return x.softmax(-1) @ v


def hide(x: Any, seen: Any) -> Any:
    return x.masked_fill(~seen, -math.inf)


def indices() -> tuple[Any, Any]:
    return torch.arange(S)[:, None], torch.arange(S)[None]


# ---------------------------------------------------------------------------------------------
# the softmax is another one

ANOTHER_AXIS = "softmax runs over another axis"


@left_alone(ANOTHER_AXIS)
def softmax_over_queries(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-2) @ v


@left_alone(ANOTHER_AXIS)
def softmax_over_heads(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(1) @ v


@left_alone(ANOTHER_AXIS)
def softmax_over_all_pairs(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).reshape(B, H, S * S).softmax(-1).reshape(B, H, S, S) @ v


@left_alone(ANOTHER_AXIS)
def weights_transposed(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-1).transpose(-1, -2) @ v


@left_alone("multiplied with something else than the softmax")
def softmax_twice(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-1).softmax(-1) @ v


@rewritten()
def log_softmax_and_exp(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).log_softmax(-1).exp() @ v


@left_alone("passes through 'subtract'")
def difference_of_two(q: Any, k: Any, v: Any) -> Any:
    x = scores(q, k)
    return (x.softmax(-1) - 0.3 * (2 * x).softmax(-1)) @ v


# ---------------------------------------------------------------------------------------------
# the weights are changed, cut or used again

ELSEWHERE = "the attention scores or weights are also used elsewhere"


@left_alone("passes through 'multiply'")
def mask_after_softmax(q: Any, k: Any, v: Any) -> Any:
    return (scores(q, k).softmax(-1) * torch.ones(S, S).tril()) @ v


@left_alone("selected by a condition")
def mask_after_softmax_by_where(q: Any, k: Any, v: Any) -> Any:
    i, j = indices()
    return torch.where(j <= i, scores(q, k).softmax(-1), 0.0) @ v


@left_alone("passes through 'multiply'", torch.rand(H, 1, 1))
def head_mask(q: Any, k: Any, v: Any, kept: Any) -> Any:
    return (scores(q, k).softmax(-1) * kept) @ v


@left_alone("only some of the softmax's results")
def last_keys_dropped(q: Any, k: Any, v: Any) -> Any:
    return scores(q, k).softmax(-1)[..., :8] @ v[:, :, :8]


@left_alone("only some of the softmax's results")
def two_sinks(q: Any, k: Any, v: Any) -> Any:
    return torch.cat([scores(q, k), torch.zeros(B, H, S, 2)], -1).softmax(-1)[..., :-2] @ v


@left_alone("only some of the softmax's results")
def sink_that_stays_and_a_key_that_goes(q: Any, k: Any, v: Any) -> Any:
    return (
        torch.cat([scores(q, k), torch.zeros(B, H, S, 1)], -1).softmax(-1)[..., :-2] @ v[:, :, 1:]
    )


@left_alone("f mixes keys: it reads what was computed from several scores")
def sink_made_of_the_scores(q: Any, k: Any, v: Any) -> Any:
    x = scores(q, k)
    return torch.cat([x, x.mean(-1, keepdim=True)], -1).softmax(-1)[..., :-1] @ v


@rewritten("softmax+learned-sink")
def sink_beside_the_keys(q: Any, k: Any, v: Any) -> Any:
    return torch.cat([scores(q, k), torch.zeros(B, H, S, 1)], -1).softmax(-1)[..., :-1] @ v


@rewritten("softmax+learned-sink", "causal", torch.randn(H))
def sink_of_each_head(q: Any, k: Any, v: Any, sink: Any) -> Any:
    """As gpt-oss: the maximum is taken off, which changes nothing."""
    x = hide(scores(q, k), torch.ones(S, S).tril().bool())
    x = torch.cat([x, sink.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], -1)
    x = x - x.max(-1, keepdim=True).values
    return x.softmax(-1)[..., :-1] @ v


@rewritten("softmax+soft-cap(5)+learned-sink", "none", torch.randn(B, H, S, 1))
def sink_of_each_query_before_the_keys(q: Any, k: Any, v: Any, sink: Any) -> Any:
    x = torch.cat([sink, 5 * (scores(q, k) / 5).tanh()], -1)
    return x.softmax(-1)[..., 1:] @ v


@left_alone("the attention weights are also returned")
def weights_returned(q: Any, k: Any, v: Any) -> Any:
    weights = scores(q, k).softmax(-1)
    return weights @ v, weights


@left_alone(ELSEWHERE)
def weights_averaged(q: Any, k: Any, v: Any) -> Any:
    weights = scores(q, k).softmax(-1)
    return weights @ v, weights.mean(1)


@left_alone(ELSEWHERE)
def weights_of_two_products(q: Any, k: Any, v: Any) -> Any:
    weights = scores(q, k).softmax(-1)
    return weights @ v + weights @ k


@left_alone(ELSEWHERE, torch.randn(S, S, D))
def relative_values(q: Any, k: Any, v: Any, r: Any) -> Any:
    weights = scores(q, k).softmax(-1)
    return weights @ v + torch.einsum("bhst,std->bhsd", weights, r)


@left_alone(ELSEWHERE)
def scores_used_again(q: Any, k: Any, v: Any) -> Any:
    x = scores(q, k)
    return attend(x, v) + x.sum(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------
# f mixes keys, or depends on which keys there are


@left_alone("f mixes keys: it has 'cumsum'")
def cumulative(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k).cumsum(-1), v)


@left_alone("f mixes keys: it has 'flip'")
def keys_reversed(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k).flip(-1), v)


@left_alone("f mixes keys: it has 'take'")
def keys_rolled(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k).roll(1, -1), v)


@left_alone("f mixes keys")
def normalised_rows(q: Any, k: Any, v: Any) -> Any:
    x = scores(q, k)
    return attend(x / x.norm(dim=-1, keepdim=True), v)


@left_alone("a mask that depends on the scores")
def top_k(q: Any, k: Any, v: Any) -> Any:
    x = scores(q, k)
    return attend(x.masked_fill(x < x.topk(4, -1).values[..., -1:], -math.inf), v)


@left_alone("a mask that depends on the scores")
def positive_only(q: Any, k: Any, v: Any) -> Any:
    x = scores(q, k)
    return attend(torch.where(x > 0, x, -math.inf), v)


@left_alone("a number rounded to an integer")
def rounded(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k).to(torch.int32).float(), v)


@left_alone("the values are scaled")
def values_scaled(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k), v * 2)


@left_alone("no layout that strides describe")
def keys_not_transposed(q: Any, k: Any, v: Any) -> Any:
    """[S, 12] times [12, D]: the sizes fit, and the second factor is no transpose."""
    return attend(q[..., :12] @ k[..., :12], v)


# ---------------------------------------------------------------------------------------------
# attention in disguise: other layouts, other heads, other lengths


@rewritten()
def scores_transposed(q: Any, k: Any, v: Any) -> Any:
    return (k @ q.transpose(-1, -2) * 0.25).softmax(-2).transpose(-1, -2) @ v


@rewritten()
def weights_on_the_right(q: Any, k: Any, v: Any) -> Any:
    return (v.transpose(-1, -2) @ scores(q, k).softmax(-1).transpose(-1, -2)).transpose(-1, -2)


@rewritten()
def some_keys_of_another_start(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k)[..., 2:10], v[:, :, :8])


@rewritten(kv_heads=2)
def batch_and_heads_swapped(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k)[:, :2], v[:, :2].transpose(0, 1))


@rewritten(kv_heads=2)
def heads_in_groups(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k[:, :2].repeat_interleave(2, 1)), v[:, :2].repeat_interleave(2, 1))


@rewritten()
def heads_interleaved(q: Any, k: Any, v: Any) -> Any:
    """Query head h reads KV head h % 2, which is not a group."""
    return attend(scores(q, k[:, :2].repeat(1, 2, 1, 1)), v[:, :2].repeat(1, 2, 1, 1))


@rewritten()
def keys_in_groups_values_not(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k[:, :2].repeat_interleave(2, 1)), v)


@rewritten()
def one_key_head(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k[:, :1]), v)


@rewritten(kv_heads=1)
def no_batch_and_no_heads(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q[0, 0], k[0, 0]), v[0, 0])


@rewritten()
def lengths_that_differ(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q[:, :, :5], k[:, :, :7]), v[:, :, :7])


@rewritten()
def by_einsum(q: Any, k: Any, v: Any) -> Any:
    x = torch.einsum("bhsd,bhtd->bhst", q, k)
    return torch.einsum("bhst,bhtd->bshd", (x * 0.25).softmax(-1), v)


@rewritten()
def softmax_in_double(q: Any, k: Any, v: Any) -> Any:
    return scores(q.double(), k.double()).softmax(-1).float() @ v


@rewritten()
def huge_scores(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k) * 1e4, v)


@rewritten()
def scale_of_zero(q: Any, k: Any, v: Any) -> Any:
    return attend(scores(q, k) * 0.0, v)


# ---------------------------------------------------------------------------------------------
# functions and masks that no list names


@rewritten("softmax+element-wise")
def argument_named_twice(q: Any, k: Any, v: Any) -> Any:
    x = scores(q, k)
    return attend(x * torch.sigmoid(x) + F.softplus(x), v)


@rewritten("softmax+element-wise", "none", torch.rand(S) + 0.5)
def scale_of_the_key(q: Any, k: Any, v: Any, gain: Any) -> Any:
    return attend(scores(q, k) * gain, v)


@rewritten("softmax+element-wise")
def negative_scale(q: Any, k: Any, v: Any) -> Any:
    return attend(-scores(q, k), v)


@rewritten("softmax+element-wise")
def hidden_by_zero(q: Any, k: Any, v: Any) -> Any:
    """A score of 0 is still seen."""
    i, j = indices()
    return attend(torch.where(j <= i, scores(q, k), 0.0), v)


@rewritten("softmax+element-wise")
def forget_gate(q: Any, k: Any, v: Any) -> Any:
    decay = F.logsigmoid(k.sum(-1)).cumsum(-1)
    return attend(scores(q, k) + decay[..., None] - decay[:, :, None], v)


def _odd_bias() -> torch.Tensor:
    bias = torch.zeros(S, S)
    bias[3, 4], bias[5, 6] = math.inf, math.nan
    return bias


@rewritten("softmax+bias", "none", _odd_bias())
def bias_with_inf_and_nan(q: Any, k: Any, v: Any, bias: Any) -> Any:
    """Both make NaN of a whole row, in PyTorch as in the kernel."""
    return attend(scores(q, k) + bias, v)


@rewritten("softmax+bias", "none", torch.rand(H, B, S, S))
def bias_of_swapped_axes(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return attend(scores(q, k) + bias.transpose(0, 1).transpose(-1, -2), v)


@rewritten("softmax+bias", "none", torch.randn(H, S, D))
def second_product(q: Any, k: Any, v: Any, r: Any) -> Any:
    """Scores of relative positions: a product of its own, read as a bias."""
    return attend(scores(q, k) + q @ r.transpose(-1, -2), v)


@rewritten("softmax+bias", "none", torch.randint(0, 3, (B, S)))
def padding_that_is_no_boolean(q: Any, k: Any, v: Any, n: Any) -> Any:
    """1 - n is -1 where n is 2: the key's score rises by as much as others fall."""
    return attend(scores(q, k) + (1.0 - n[:, None, None].float()) * 100.0, v)


@rewritten("softmax", "packed-documents", torch.tensor([[5] * S, [5, 5, 5 + (1 << 32)] * 4]))
def packed_documents_of_wide_numbers(q: Any, k: Any, v: Any, ids: Any) -> Any:
    """Two documents whose int64 numbers differ beyond 32 bits."""
    return attend(hide(scores(q, k), ids[:, None, :, None] == ids[:, None, None]), v)


@rewritten("softmax", "prefix-lm", torch.tensor([3, 5]))
def prefix_lm(q: Any, k: Any, v: Any, prefix: Any) -> Any:
    i, j = indices()
    return attend(hide(scores(q, k), (j <= i) | (j < prefix[:, None, None, None])), v)


@rewritten("softmax", "predicate")
def every_other_key(q: Any, k: Any, v: Any) -> Any:
    i, j = indices()
    return attend(hide(scores(q, k), (i - j) % 2 == 0), v)


@rewritten("softmax", "causal")
def causal_from_the_last_key(q: Any, k: Any, v: Any) -> Any:
    seen = torch.ones(5, S, dtype=torch.bool).tril(S - 5)
    return attend(hide(scores(q[:, :, :5], k), seen), v)


@rewritten("softmax", "q+0 <= t")
def only_later_keys(q: Any, k: Any, v: Any) -> Any:
    return attend(hide(scores(q, k), torch.ones(S, S, dtype=torch.bool).triu()), v)


# ---------------------------------------------------------------------------------------------


class Module(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def inputs(extra: tuple[Any, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return (*(torch.randn(B, H, S, D, generator=generator) for _ in range(3)), *extra)


@pytest.mark.parametrize("function", LEFT, ids=lambda f: f.__name__)
def test_left_alone(function: Function) -> None:
    reason, extra = LEFT[function]
    mod = zoo.import_module(Module(function), inputs(extra))
    new, report = zoo.inject(mod)
    assert report.sites
    assert all(reason in site.reason for site in report.sites), report.sites
    assert structural_equal(new["main"], mod["main"])


class _NoKernel:
    symbol = "none"


def described(function: Function, extra: tuple[Any, ...]) -> SiteReport:
    report = Report()
    mod = zoo.import_module(Module(function), inputs(extra))
    InjectAttention(target=resolve_target("native"), report=report, build=lambda spec: _NoKernel())(
        mod
    )
    (site,) = report.sites
    return site


@pytest.mark.parametrize("function", REWRITTEN, ids=lambda f: f.__name__)
def test_described(function: Function) -> None:
    wanted, extra, _ = REWRITTEN[function]
    site = described(function, extra)
    assert site.reason == ""
    assert (site.variant, site.mask, site.num_kv_heads) == wanted


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(f, id=f.__name__, marks=() if shared else pytest.mark.heavy)
        for f, (_, _, shared) in REWRITTEN.items()
    ],
)
def test_same_result(function: Function) -> None:
    extra = REWRITTEN[function][1]
    args = inputs(extra)
    want = function(*args).numpy()
    mod, _ = zoo.inject(zoo.import_module(Module(function), args))
    got = zoo.run(mod, args)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert zoo.distance(np.nan_to_num(got), np.nan_to_num(want)) <= 1e-5
