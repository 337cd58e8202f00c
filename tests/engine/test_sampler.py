"""Greedy, temperature, top-p."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_flashinfer.engine.sampler import Sampler, SamplingParams
from tvm_flashinfer.errors import UserError

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3], np.float32))


def test_greedy_takes_the_first_of_the_greatest():
    assert Sampler(SamplingParams())(np.array([1, 3, 2, 3], np.float32)) == 1


def test_temperature_sharpens_and_flattens():
    probs = Sampler(SamplingParams(temperature=1)).probabilities(LOGITS)
    np.testing.assert_allclose(probs, [0.05, 0.5, 0.15, 0.3], rtol=1e-6)
    cold = Sampler(SamplingParams(temperature=0.1)).probabilities(LOGITS)
    hot = Sampler(SamplingParams(temperature=100)).probabilities(LOGITS)
    assert cold[1] > 0.99
    np.testing.assert_allclose(hot, 0.25, atol=0.01)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.94, [1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    probs = Sampler(SamplingParams(temperature=1, top_p=top_p)).probabilities(LOGITS)
    assert np.flatnonzero(probs).tolist() == kept
    assert probs.sum() == pytest.approx(1)


def test_samples_follow_the_distribution():
    sampler = Sampler(SamplingParams(temperature=1, top_p=0.9, seed=0))
    counts = np.bincount([sampler(LOGITS) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, np.array([0, 0.5, 0.15, 0.3]) / 0.95, atol=0.03)


def test_a_seed_makes_it_repeatable():
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1, seed=seed))
        return [sampler(np.zeros(1000, np.float32)) for _ in range(5)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_extreme_logits():
    logits = np.array([-np.inf, 1e30, -1e30, 0], np.float32)
    assert Sampler(SamplingParams(temperature=0.5, seed=0))(logits) == 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ("",)}, "stop string is empty"),
    ],
)
def test_parameters_out_of_range(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        SamplingParams(**wrong)
