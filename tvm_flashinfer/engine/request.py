"""One prompt on its way to an answer."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from .detokenizer import StopStrings, StreamingDetokenizer
from .sampler import Sampler, SamplingParams
from .scheduler import TokenSequence

__all__ = ["Completion", "Delta", "FinishReason", "Request"]

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""Why an answer ended: end-of-sequence token or stop string, ``max_tokens``, the model's context
(or the whole KV pool) is full, or the caller stopped it."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one step added to an answer.

    Attributes
    ----------
    index: of the prompt.
    text: new text, whole characters only; may be empty.
    token_id: the new token, or None for a delta that only flushes text.
    finish_reason: set on the last delta.
    """

    index: int
    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes
    ----------
    token_ids: every generated token, the end-of-sequence token included.
    prompt_tokens: length of the prompt; cached_tokens: how many of them were in the cache.
    first_token_seconds: from submission to the first token, waiting included.
    token_seconds: median time between two tokens of this answer, 0 if there was one only.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    first_token_seconds: float
    token_seconds: float


class Request:
    """The state of one answer: its tokens, its sampler, its text.

    Attributes
    ----------
    sequence: the tokens, as the scheduler sees them.
    deltas: what the caller hasn't taken yet.
    keep: whether its tokens stay in the cache when it is done.
    """

    def __init__(
        self,
        index: int,
        sequence: TokenSequence,
        params: SamplingParams,
        *,
        max_length: int,
        eos_token_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None,
        keep: bool,
    ) -> None:
        self.index = index
        self.keep = keep
        self.sequence = sequence
        self.deltas: deque[Delta] = deque()
        self.finish_reason: FinishReason | None = None
        self._prompt_tokens = len(sequence.tokens)
        self._cached_tokens = sequence.cached
        self._params = params
        self._max_length = max_length
        self._eos = () if params.ignore_eos else tuple(eos_token_ids)
        self._sampler = Sampler(params)
        self._detokenizer = StreamingDetokenizer(decode) if decode is not None else None
        self._stop = StopStrings(params.stop)
        self._text: list[str] = []
        self._submitted = time.perf_counter()
        self._token_times: list[float] = []

    @property
    def token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.sequence.tokens[self._prompt_tokens :]

    def accept(self, logits: npt.NDArray[np.float32]) -> None:
        """Samples the next token from ``logits`` [V] and decides whether it was the last."""
        token = self._sampler(logits)
        self.sequence.tokens.append(token)
        self._token_times.append(time.perf_counter())
        reason: FinishReason | None = None
        text = ""
        if token in self._eos:
            reason = "stop"
        else:
            if self._detokenizer is not None:
                text = self._stop.push(self._detokenizer.push(token))
            if self._stop.found:
                reason = "stop"
            elif len(self._token_times) >= self._params.max_tokens:
                reason = "length"
            elif len(self.sequence.tokens) >= self._max_length:
                reason = "context"
        if reason is None:
            self._emit(Delta(self.index, text, token))
        else:
            self._finish(reason, text, token)

    def cancel(self) -> None:
        """Ends the answer where it is."""
        if self.finish_reason is None:
            self._finish("cancelled", "", None)

    def completion(self) -> Completion:
        """The finished answer."""
        assert self.finish_reason is not None
        times = [self._submitted, *self._token_times]
        gaps = np.diff(self._token_times)
        return Completion(
            index=self.index,
            text="".join(self._text),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            first_token_seconds=times[min(1, len(times) - 1)] - self._submitted,
            token_seconds=float(np.median(gaps)) if len(gaps) else 0.0,
        )

    def _finish(self, reason: FinishReason, text: str, token: int | None) -> None:
        self.finish_reason = reason
        if self._detokenizer is not None and not self._stop.found:
            text += self._stop.push(self._detokenizer.finish())
            text += "" if self._stop.found else self._stop.finish()
        self._emit(Delta(self.index, text, token, reason))

    def _emit(self, delta: Delta) -> None:
        self._text.append(delta.text)
        self.deltas.append(delta)
