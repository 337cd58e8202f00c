"""Choosing the next token from logits: greedy, temperature, top-p. On the host, in numpy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from ..errors import UserError

__all__ = ["Sampler", "SamplingParams"]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is to be answered.

    Attributes
    ----------
    max_tokens: at most this many new tokens; the model's context may end the answer earlier.
    temperature: 0 is greedy: the most likely token, the lowest id where several tie.
    top_p: sample from the smallest set of tokens whose probabilities sum to at least this.
    seed: of the request's own random generator; None draws one from the system. A request's
        samples depend on its seed only, never on the batch it runs in.
    stop: the answer ends before the first of these strings.
    ignore_eos: go on past the end-of-sequence token (for measurements).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}, but at least 1 is needed.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}, but 0 (greedy) or more is needed.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, but a value in (0, 1] is needed.")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed is {self.seed}, but 0 or more is needed.")
        if any(not text for text in self.stop):
            raise UserError("A stop string is empty, but at least one character is needed.")


class Sampler:
    """The random state of one request."""

    def __init__(self, params: SamplingParams) -> None:
        self._temperature = params.temperature
        self._top_p = params.top_p
        self._rng = None if params.temperature == 0 else np.random.default_rng(params.seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token id, from float32 logits ``[V]``."""
        if self._rng is None:
            return int(np.argmax(logits))
        probs = self.probabilities(logits)
        # Inverse transform sampling; cumsum's last element may round to less than 1.
        index = np.searchsorted(np.cumsum(probs), self._rng.random(), side="right")
        return int(index) if index < len(probs) else int(np.flatnonzero(probs)[-1])

    def probabilities(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The distribution sampled from: softmax at the temperature, cut to top-p, float64 [V]."""
        scaled = logits.astype(np.float64)
        scaled = (scaled - scaled.max()) / self._temperature
        probs = np.exp(scaled)
        probs /= probs.sum()
        if self._top_p < 1:
            order = np.argsort(-probs, kind="stable")
            before = np.cumsum(probs[order]) - probs[order]
            probs[order[before >= self._top_p]] = 0
            probs /= probs.sum()
        return probs
