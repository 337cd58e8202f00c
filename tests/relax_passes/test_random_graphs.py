"""Random attention graphs: what is rewritten gives what the graph says, what mixes keys is left.

A graph is drawn as a layout of its operands and a chain of steps from scores to what softmax takes.
Each step is written twice: as Relax operators, and in float64 NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tvm
from graphs import Graph, build, indices, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm_ffi import structural_equal

from relax_passes.inject import InjectAttention
from relax_passes.report import Report
from relax_passes.targets import resolve_target

BATCH, DIM = 2, 8
Array = Any


@dataclass
class Step:
    """What is done to scores [BATCH, heads, queries, keys]; ``arrays`` are further inputs."""

    name: str
    graph: Callable[..., Any]
    numpy: Callable[..., Array]
    shapes: tuple[tuple[int, ...], ...] = ()
    mixes_keys: bool = False

    def __repr__(self) -> str:
        return self.name


def f32(value: float) -> relax.Constant:
    return relax.const(value, "float32")


def steps(heads: int, length: int) -> st.SearchStrategy[Step]:
    """Steps that keep each score apart from the others."""

    def scale(by: float) -> Step:
        return Step(f"scale {by}", lambda g, x: g.multiply(x, f32(by)), lambda x: x * by)

    def soft_cap(cap: float) -> Step:
        return Step(
            f"soft-cap {cap}",
            lambda g, x: g.multiply(g.tanh(g.divide(x, f32(cap))), f32(cap)),
            lambda x: np.tanh(x / cap) * cap,
        )

    def decay(slope: float) -> Step:
        def graph(g: Graph, x: Any) -> Any:
            query, key = indices(g, length)
            far = g.astype(g.abs(g.subtract(query, key)), "float32")
            return g.subtract(x, g.multiply(far, f32(slope)))

        i, j = np.indices((length, length))
        return Step(f"decay {slope}", graph, lambda x: x - slope * abs(i - j))

    gate = Step(
        "gate",
        lambda g, x: g.multiply(x, g.sigmoid(x)),
        lambda x: x / (1 + np.exp(-x)),
    )
    gain = Step(
        "gain of a head",
        lambda g, x, a: g.multiply(x, g.reshape(a, [1, heads, 1, 1])),
        lambda x, a: x * a[None, :, None, None],
        ((heads,),),
    )
    bias = st.sampled_from(
        [(heads, length, length), (1, 1, length, length), (BATCH, 1, 1, length), (length,)]
    ).map(
        lambda shape: Step(f"bias {shape}", lambda g, x, a: g.add(x, a), np.add, (shape,)),
    )
    floats = st.sampled_from([0.25, 0.5, 1.5])
    return st.one_of(
        floats.map(scale),
        st.sampled_from([2.0, 30.0]).map(soft_cap),
        floats.map(decay),
        st.just(gate),
        st.just(gain),
        bias,
    )


def masks(length: int) -> st.SearchStrategy[Step]:
    """Masks from arithmetic of indices, by ``where`` or by adding -inf. Each query sees a key."""
    i, j = np.indices((length, length))

    def make(name: str, seen: Callable[..., Any], keep: Array, added: bool) -> Step:
        def graph(g: Graph, x: Any) -> Any:
            query, key = indices(g, length)
            visible = seen(g, query, key)
            if added:
                return g.add(x, g.where(visible, f32(0.0), f32(-math.inf)))
            return g.where(visible, x, f32(-math.inf))

        return Step(name, graph, lambda x: np.where(keep, x, -np.inf))

    def window(width: int, added: bool) -> Step:
        def seen(g: Graph, query: Any, key: Any) -> Any:
            near = g.less(g.subtract(query, key), relax.const(width, "int64"))
            return g.logical_and(g.less_equal(key, query), near)

        return make(f"window {width}", seen, (j <= i) & (i - j < width), added)

    def prefix(count: int, added: bool) -> Step:
        def seen(g: Graph, query: Any, key: Any) -> Any:
            early = g.less(key, relax.const(count, "int64"))
            return g.logical_or(g.less_equal(key, query), early)

        return make(f"prefix {count}", seen, (j <= i) | (j < count), added)

    def causal(added: bool) -> Step:
        return make("causal", lambda g, query, key: g.less_equal(key, query), j <= i, added)

    sizes = st.integers(1, length)
    return st.one_of(
        st.booleans().map(causal),
        st.builds(window, sizes, st.booleans()),
        st.builds(prefix, sizes, st.booleans()),
    )


MIXERS = [
    Step(
        "cumulative sum",
        lambda g, x: g.cumsum(x, axis=-1),
        lambda x: x.cumsum(-1),
        mixes_keys=True,
    ),
    Step(
        "less the square of its mean",
        lambda g, x: g.subtract(g.square(x), g.multiply(x, g.mean(x, axis=[-1], keepdims=True))),
        lambda x: x**2 - x * x.mean(-1, keepdims=True),
        mixes_keys=True,
    ),
    Step(
        "times its row's variance",
        lambda g, x: g.multiply(x, g.variance(x, axis=[-1], keepdims=True)),
        lambda x: x * x.var(-1, keepdims=True),
        mixes_keys=True,
    ),
]


@dataclass
class Recipe:
    """One attention: its operands' layouts, and what happens between scores and softmax."""

    length: int
    kv_heads: int
    group: int
    tokens_first: bool  #: operands are [batch, tokens, heads, dim], not heads before tokens
    folded: bool  #: batch and heads are one axis where scores are made
    scaled_query: bool  #: the scale is on the query, not on scores
    expanded: str  #: how the keys of a group are given to each of its heads
    steps: list[Step] = field(default_factory=list)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def mixes_keys(self) -> bool:
        return any(step.mixes_keys for step in self.steps)

    def shape(self, heads: int) -> tuple[int, ...]:
        axes = (self.length, heads) if self.tokens_first else (heads, self.length)
        return (BATCH, *axes, DIM)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of q, k, v and what the steps read."""
        operands = [self.shape(self.heads), self.shape(self.kv_heads), self.shape(self.kv_heads)]
        return operands + [shape for step in self.steps for shape in step.shapes]

    def module(self) -> tvm.IRModule:
        params = [tensor(f"p{n}", *shape) for n, shape in enumerate(self.shapes)]
        return tvm.IRModule({"main": build(self._graph, *params)})

    def _graph(self, g: Graph, q: Any, k: Any, v: Any, *arrays: Any) -> Any:
        b, h, s = BATCH, self.heads, self.length
        if self.tokens_first:
            q, k, v = (g.permute_dims(x, [0, 2, 1, 3]) for x in (q, k, v))
        if self.group > 1:
            k, v = (self._expand(g, x) for x in (k, v))
        scale = f32(1 / math.sqrt(DIM))
        if self.scaled_query:
            q = g.multiply(q, scale)
        if self.folded:
            q, k, v = (g.reshape(x, [b * h, s, DIM]) for x in (q, k, v))
        x = g.matmul(q, g.permute_dims(k, [0, 2, 1] if self.folded else [0, 1, 3, 2]))
        if self.folded:
            x = g.reshape(x, [b, h, s, s])
        if not self.scaled_query:
            x = g.multiply(x, scale)
        rest = list(arrays)
        for step in self.steps:
            x = step.graph(g, x, *[rest.pop(0) for _ in step.shapes])
        weights = g.softmax(x)
        if self.folded:
            weights = g.reshape(weights, [b * h, s, s])
        o = g.matmul(weights, v)
        if self.folded:
            o = g.reshape(o, [b, h, s, DIM])
        return g.reshape(g.permute_dims(o, [0, 2, 1, 3]), [b, s, h * DIM])

    def _expand(self, g: Graph, x: Any) -> Any:
        if self.expanded == "repeat":
            return g.repeat(x, self.group, 1)
        x = g.broadcast_to(
            g.expand_dims(x, 2), [BATCH, self.kv_heads, self.group, self.length, DIM]
        )
        return g.reshape(x, [BATCH, self.heads, self.length, DIM])

    def numpy(self, q: Array, k: Array, v: Array, *arrays: Array) -> Array:
        if self.tokens_first:
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        k, v = (x.repeat(self.group, axis=1) for x in (k, v))
        x = q @ k.swapaxes(2, 3) / math.sqrt(DIM)
        rest = list(arrays)
        for step in self.steps:
            x = step.numpy(x, *[rest.pop(0) for _ in step.shapes])
        weights = np.exp(x - x.max(-1, keepdims=True))
        o = weights / weights.sum(-1, keepdims=True) @ v
        return o.swapaxes(1, 2).reshape(BATCH, self.length, -1)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    recipe = Recipe(
        length=draw(st.sampled_from([1, 5, 17])),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3])),
        tokens_first=draw(st.booleans()),
        folded=draw(st.booleans()),
        scaled_query=draw(st.booleans()),
        expanded=draw(st.sampled_from(["repeat", "broadcast"])),
    )
    recipe.steps = draw(st.lists(steps(recipe.heads, recipe.length), max_size=3))
    # After a mask -inf would spread from key to key: both graphs would be full of NaN.
    mixers = st.sampled_from(MIXERS) if recipe.length > 1 else st.nothing()
    last = draw(st.one_of(st.none(), masks(recipe.length), mixers))
    return recipe if last is None else Recipe(**{**vars(recipe), "steps": [*recipe.steps, last]})


def check(recipe: Recipe) -> None:
    mod, target, report = recipe.module(), resolve_target("native"), Report()
    new = InjectAttention(target=target, report=report)(mod)
    if recipe.mixes_keys:
        assert structural_equal(new["main"], mod["main"]), report
        assert all(site.reason for site in report.sites), report
        return
    assert [site.reason for site in report.sites] == [""], report
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(shape).astype("float32") for shape in recipe.shapes]
    machine = relax.VirtualMachine(tvm.compile(new, target=target), tvm.cpu())
    result = machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()
    expected = recipe.numpy(*(array.astype(float) for array in arrays))
    assert np.abs(result - expected).max() <= 1e-5 * np.abs(expected).max()


FEW = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=80, derandomize=False)


@FEW
@given(recipes())
def test_random_graphs(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@MANY
@given(recipes())
def test_many_random_graphs(recipe: Recipe) -> None:
    check(recipe)
