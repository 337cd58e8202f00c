"""The local engine: prompts in, answers out, many at once.

>>> engine = Engine.load("model-dir")
>>> for delta in engine.stream("Once upon a time"):
...     print(delta.text, end="")
>>> answers = engine.generate(["One", "Two"], SamplingParams(max_tokens=16))

Every step appends a chunk of pending prompts (of several requests at once) and then one token to
each request that is past its prompt: continuous batching. Nothing runs in the background: the
engine steps while a caller waits for ``generate`` or takes from ``stream``.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..manifest import Manifest
from .model import CompiledModel
from .request import Completion, Delta, Request
from .sampler import SamplingParams
from .scheduler import Scheduler, TokenSequence
from .tokenizer import Tokenizer

__all__ = ["Engine", "EngineStats", "Prompt", "Session"]

Prompt = str | Sequence[int]
"""A text, or the token ids themselves."""

_STILL_ANSWERING = "The session is still answering; take its whole answer, or close the stream."


@dataclasses.dataclass
class EngineStats:
    """What the engine did since it was loaded.

    Attributes
    ----------
    prefill_tokens, prefill_seconds: appended by prefill, in which time.
    decode_tokens, decode_steps, decode_seconds: appended by decode steps, one per request.
    preemptions: requests that had to be computed again because the KV pool was full.
    peak_batch: most requests that ran at once.
    total_pages, free_pages: of the KV pool.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    preemptions: int = 0
    peak_batch: int = 0
    total_pages: int = 0
    free_pages: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def step_seconds(self) -> float:
        """Mean time of a decode step: the time between two tokens of one answer."""
        return self.decode_seconds / self.decode_steps if self.decode_steps else 0.0


class Session:
    """A conversation whose tokens stay in the KV cache between its turns.

    A turn appends only what the cache doesn't hold yet. The cached tokens are a cache: the engine
    may evict them for other requests, and computes them again when the session goes on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.sequence: TokenSequence | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the conversation in the KV cache."""
        return self.sequence.cached if self.sequence is not None else 0

    def reset(self) -> None:
        """Forgets the conversation and frees its pages."""
        if self.sequence is not None:
            self._engine.release(self.sequence)
            self.sequence = None


class Engine:
    """A compiled model, ready to answer.

    Attributes
    ----------
    manifest: what was compiled, for what, and its limits.
    model: the functions and the KV cache underneath.
    """

    def __init__(self, model: CompiledModel, tokenizer: Tokenizer | None) -> None:
        self.model = model
        self.manifest: Manifest = model.manifest
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(model, self.manifest.prefill_chunk_size)
        self._requests: dict[int, Request] = {}
        self._seq_ids = itertools.count()
        self._stats = EngineStats()

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        kv_tokens: int | None = None,
        max_batch: int | None = None,
    ) -> Engine:
        """Loads a directory made by ``tvm-flashinfer compile``.

        Parameters
        ----------
        kv_tokens: size of the KV pool in tokens, for all requests together.
        max_batch: requests computed at once, at most what the model was compiled for.

        Raises
        ------
        UserError
            If the directory or an argument can't be used.
        """
        root = Path(directory)
        model = CompiledModel(root, kv_tokens=kv_tokens, max_batch=max_batch)
        tokenizer = Tokenizer(root) if (root / "tokenizer.json").exists() else None
        return cls(model, tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; a UserError if its checkpoint had none."""
        if self._tokenizer is None:
            raise UserError(
                "This model was compiled from a checkpoint without a tokenizer, so it takes "
                "token ids only."
            )
        return self._tokenizer

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt: the context, or the KV pool, less one token for the answer."""
        return min(self.manifest.max_seq_len, self._scheduler.capacity) - 1

    @property
    def stats(self) -> EngineStats:
        """A copy of the counters."""
        return dataclasses.replace(
            self._stats,
            preemptions=self._scheduler.preemptions,
            total_pages=self.model.total_pages,
            free_pages=self.model.free_pages,
        )

    def default_params(self) -> SamplingParams:
        """Sampling as the checkpoint's generation_config.json asks for; greedy if it doesn't."""
        generation = self.manifest.generation
        return SamplingParams(temperature=generation.temperature, top_p=generation.top_p)

    def session(self) -> Session:
        """A new conversation, for ``stream``."""
        return Session(self)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[Completion]:
        """Answers many prompts, batched continuously; returns the answers in prompt order.

        Parameters
        ----------
        params: for all prompts, or one for each; by default ``default_params()``.
        on_delta: called with each new piece of an answer, as it comes.

        Raises
        ------
        UserError
            Before anything runs, if a prompt can't be used; the sentence names it.
        """
        each = self._params_for(prompts, params)
        tokens = []
        for index, prompt in enumerate(prompts):
            try:
                tokens.append(self._prompt_tokens(prompt))
            except UserError as error:
                where = f"Prompt {index + 1} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise UserError(f"{where}{error}") from error
        requests = [
            self._submit(index, ids, p, None)
            for index, (ids, p) in enumerate(zip(tokens, each, strict=True))
        ]
        try:
            while any(request.finish_reason is None for request in requests):
                self.step()
                for request in requests:
                    _drain(request, on_delta)
        finally:
            for request in requests:
                self._abandon(request)
        return [request.completion() for request in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        session: Session | None = None,
    ) -> Generator[Delta, None, None]:
        """Answers one prompt piece by piece.

        Closing the iterator stops the answer. Several streams may be open at once: they are
        batched.

        Parameters
        ----------
        session: a conversation; ``prompt`` is then the whole conversation so far, of which only
            the part that isn't cached is computed.

        Raises
        ------
        UserError
            At once, if the prompt can't be used.
        """
        ids = self._prompt_tokens(prompt)
        request = self._submit(0, ids, params or self.default_params(), session)
        return self._stream(request)

    def step(self) -> None:
        """One step: a chunk of prefill, then a token for each request past its prompt."""
        try:
            self._step_prefill()
            self._step_decode()
        except BaseException:
            # The pass may have stopped half way (an error, or Ctrl-C): what the cache holds is
            # unknown, while the tokens are all here.
            self.model.clear()
            self._scheduler.forget_all()
            raise

    def release(self, sequence: TokenSequence) -> None:
        """Frees the pages of a session's sequence."""
        if sequence.seq_id in self._requests:
            raise UserError(_STILL_ANSWERING)
        self._scheduler.retire(sequence)

    # Steps --------------------------------------------------------------------------------------

    def _step_prefill(self) -> None:
        batch = self._scheduler.next_prefill()
        self._stats.peak_batch = max(self._stats.peak_batch, len(self._scheduler.running))
        if not batch:
            return
        chunks = [s.tokens[s.cached : s.cached + count] for s, count in batch]
        wanted = [i for i, (s, count) in enumerate(batch) if count == s.pending]
        start = time.perf_counter()
        logits = self.model.prefill([s.seq_id for s, _ in batch], chunks, wanted)
        self._stats.prefill_seconds += time.perf_counter() - start
        self._stats.prefill_tokens += sum(count for _, count in batch)
        for sequence, count in batch:
            sequence.cached += count
        for row, i in enumerate(wanted):
            self._accept(batch[i][0], logits[row])

    def _step_decode(self) -> None:
        batch = self._scheduler.next_decode()
        if not batch:
            return
        start = time.perf_counter()
        logits = self.model.decode([s.seq_id for s in batch], [s.tokens[-1] for s in batch])
        self._stats.decode_seconds += time.perf_counter() - start
        self._stats.decode_tokens += len(batch)
        self._stats.decode_steps += 1
        for sequence in batch:
            sequence.cached += 1
        for row, sequence in enumerate(batch):
            self._accept(sequence, logits[row])

    def _accept(self, sequence: TokenSequence, logits: npt.NDArray[np.float32]) -> None:
        request = self._requests[sequence.seq_id]
        request.accept(logits)
        if request.finish_reason is not None:
            del self._requests[sequence.seq_id]
            self._scheduler.retire(sequence, keep=request.keep)

    # Requests -----------------------------------------------------------------------------------

    def _params_for(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = self.default_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(
                f"{len(params)} sampling parameters were given for {len(prompts)} prompts; "
                "one for each, or one for all, is needed."
            )
        return params

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise UserError("The prompt is empty, but at least one token is needed.")
        if len(ids) > self.max_prompt_tokens:
            pool = self._scheduler.capacity
            context = self.manifest.max_seq_len
            limit = f"a KV pool of {pool}" if pool < context else f"a context of {context}"
            raise UserError(
                f"The prompt has {len(ids)} tokens, but at most {self.max_prompt_tokens} fit "
                f"({limit} tokens, one of them for the answer)."
            )
        vocab = int(self.manifest.model["vocab_size"])
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise UserError(f"The prompt has token id {bad}, but ids are 0 to {vocab - 1}.")
        return ids

    def _submit(
        self, index: int, ids: list[int], params: SamplingParams, session: Session | None
    ) -> Request:
        sequence = self._sequence(ids, session)
        longest = min(self.manifest.max_seq_len, self._scheduler.capacity)
        decode = self._tokenizer.decode if self._tokenizer is not None else None
        if params.stop and decode is None:
            raise UserError("Stop strings need a tokenizer, and this model has none.")
        request = Request(
            index,
            sequence,
            params,
            max_length=longest,
            eos_token_ids=self.manifest.generation.eos_token_ids,
            decode=decode,
            keep=session is not None,
        )
        self._requests[sequence.seq_id] = request
        self._scheduler.submit(sequence)
        return request

    def _sequence(self, ids: list[int], session: Session | None) -> TokenSequence:
        """A new sequence, or the session's, cut to what it shares with ``ids``."""
        if session is None or session.sequence is None:
            sequence = TokenSequence(next(self._seq_ids), ids)
            if session is not None:
                session.sequence = sequence
            return sequence
        sequence = session.sequence
        if sequence.seq_id in self._requests:
            raise UserError(_STILL_ANSWERING)
        # The last token has to be computed in any case: its logits are wanted.
        shared = 0
        for old, new in zip(sequence.tokens[: sequence.cached], ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        self._scheduler.truncate(sequence, shared)
        sequence.tokens = ids
        return sequence

    def _stream(self, request: Request) -> Generator[Delta, None, None]:
        try:
            while request.deltas or request.finish_reason is None:
                if request.deltas:
                    yield request.deltas.popleft()
                else:
                    self.step()
        finally:
            self._abandon(request)

    def _abandon(self, request: Request) -> None:
        """Cancels a request that hasn't finished."""
        if request.finish_reason is None:
            request.cancel()
            del self._requests[request.sequence.seq_id]
            self._scheduler.retire(request.sequence, keep=request.keep)


def _drain(request: Request, on_delta: Callable[[Delta], None] | None) -> None:
    while request.deltas:
        delta = request.deltas.popleft()
        if on_delta is not None:
            on_delta(delta)
