"""Rotary position embedding: from a model's configuration to the numbers that a cache rotates with.

Every scaling that models are published with is a change of two things: the frequency of each pair
of elements, and a magnitude that multiplies what is rotated. The formulas are those of Hugging Face
transformers (``modeling_rope_utils``), which checkpoints are published for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Frequencies = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RopeConfig:
    """How a model rotates queries and keys.

    Attributes
    ----------
    theta : float
        Base of the frequencies: pair ``i`` of ``d`` elements turns ``theta ** (-2 i / d)`` radians
        per position.
    scaling : mapping
        As ``rope_scaling`` in a checkpoint's ``config.json``: ``rope_type`` is one of
        ``default``, ``linear``, ``llama3``, ``yarn`` and ``longrope``.
    rotary_dim : int, optional
        Elements of a head that are rotated, from the first on; all unless given.
    interleaved : bool
        Pairs are neighbours ``(2i, 2i + 1)``, as in GPT-J; else ``(i, i + d / 2)``, as in Llama.
    context_length : int, optional
        Tokens that sequences may have: ``longrope`` has other frequencies for long ones.
    """

    theta: float = 10000.0
    scaling: Mapping[str, Any] = field(default_factory=dict)
    rotary_dim: int | None = None
    interleaved: bool = False
    context_length: int | None = None

    def resolve(self, head_dim: int) -> tuple[npt.NDArray[np.float32], float]:
        """Frequencies, float32 ``[rotary_dim / 2]``, and the magnitude.

        Raises
        ------
        ValueError
            If the scaling is unknown or lacks a number, or the rotated elements don't fit a head.
        """
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if dim % 2 or not 0 < dim <= head_dim:
            raise ValueError(
                f"rotary_dim is {dim}, expected an even number of at most head_dim = {head_dim}"
            )
        kind = self.scaling.get("rope_type", self.scaling.get("type", "default"))
        if kind not in _SCALINGS:
            raise ValueError(f"rope_type is {kind!r}, expected one of {', '.join(_SCALINGS)}")
        base = self.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        try:
            frequencies, magnitude = _SCALINGS[kind](self, base)
        except KeyError as error:
            raise ValueError(f"rope_type {kind!r} needs {error.args[0]!r} in its scaling") from None
        return frequencies.astype(np.float32), float(magnitude)


def _default(config: RopeConfig, base: Frequencies) -> tuple[Frequencies, float]:
    return base, 1.0


def _linear(config: RopeConfig, base: Frequencies) -> tuple[Frequencies, float]:
    return base / config.scaling["factor"], 1.0


def _llama3(config: RopeConfig, base: Frequencies) -> tuple[Frequencies, float]:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    s = config.scaling
    turns = s["original_max_position_embeddings"] * base / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * base / s["factor"] + kept * base, 1.0


def _yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn(config: RopeConfig, base: Frequencies) -> tuple[Frequencies, float]:
    """Pairs that turn often within the original context are kept, slow ones stretched."""
    s = config.scaling
    factor, original, dim = s["factor"], s["original_max_position_embeddings"], 2 * len(base)

    def pair_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_of(s.get("beta_fast") or 32), pair_of(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = max(high - low, 0.001)
    stretched = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    frequencies = stretched * base / factor + (1 - stretched) * base
    if (magnitude := s.get("attention_factor")) is None:
        if s.get("mscale") and s.get("mscale_all_dim"):
            magnitude = _yarn_magnitude(factor, s["mscale"])
            magnitude /= _yarn_magnitude(factor, s["mscale_all_dim"])
        else:
            magnitude = _yarn_magnitude(factor)
    return frequencies, magnitude


def _longrope(config: RopeConfig, base: Frequencies) -> tuple[Frequencies, float]:
    """A factor for each pair: one list within the original context, another beyond it."""
    s = config.scaling
    original = s["original_max_position_embeddings"]
    context = config.context_length or original
    divisors = np.asarray(s["long_factor" if context > original else "short_factor"])
    if divisors.shape != base.shape:
        raise ValueError(f"longrope has {divisors.size} factors, expected {base.size}")
    magnitude = s.get("attention_factor")
    if magnitude is None:
        factor = s.get("factor") or context / original
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return base / divisors, magnitude


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
