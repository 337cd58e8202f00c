"""A chat of several turns over one session: the history, in words and in tokens."""

from __future__ import annotations

from collections.abc import Generator

from .engine import Engine
from .request import Delta
from .sampler import SamplingParams
from .tokenizer import Message

__all__ = ["Conversation"]


class Conversation:
    """What was said so far.

    With a chat template, a turn is what the template adds to the conversation's text. The tokens
    of earlier turns are kept as they were (the model's own answers may not be tokenised the way
    the tokenizer would), so that the KV cache needs only the new ones. Without a template the
    turns simply continue one text.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self._engine = engine
        self._system = system
        self._session = engine.session()
        self._start()

    @property
    def tokens(self) -> int:
        """Length of the conversation in tokens."""
        return len(self._tokens)

    @property
    def cached_tokens(self) -> int:
        """How many of them are in the KV cache."""
        return self._session.cached_tokens

    def reset(self) -> None:
        """Forgets everything that was said."""
        self._session.reset()
        self._start()

    def ask(self, text: str, params: SamplingParams) -> Generator[Delta, None, None]:
        """Says ``text`` and streams the answer. Closing the iterator ends the answer there.

        Raises UserError at once, the conversation being as before, if it doesn't fit any more.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        written, tokens = self._write(messages, text)
        stream = self._engine.stream(tokens, params, session=self._session)
        return self._listen(stream, messages, written, tokens)

    def _start(self) -> None:
        self._messages: list[Message] = []
        if self._system is not None:
            self._messages.append({"role": "system", "content": self._system})
        self._text = ""
        self._tokens: list[int] = []

    def _write(self, messages: list[Message], text: str) -> tuple[str, list[int]]:
        """The conversation up to the answer that is wanted: text and tokens."""
        tokenizer = self._engine.tokenizer
        if not tokenizer.has_chat_template:
            if not self._tokens:
                return text, tokenizer.encode(text)
            written = f"{self._text}\n{text}"
        else:
            written = tokenizer.render(messages)
        if self._tokens and written.startswith(self._text):
            added = tokenizer.encode(written[len(self._text) :], special=False)
            return written, self._tokens + added
        # The first turn, or a template that rewrites earlier turns.
        return written, tokenizer.encode(written, special=False)

    def _listen(
        self,
        stream: Generator[Delta, None, None],
        messages: list[Message],
        written: str,
        tokens: list[int],
    ) -> Generator[Delta, None, None]:
        answer: list[str] = []
        new: list[int] = []
        try:
            for delta in stream:
                answer.append(delta.text)
                if delta.token_id is not None:
                    new.append(delta.token_id)
                yield delta
        finally:
            stream.close()
            decode = self._engine.tokenizer.decode
            # A decoder may drop a space at the start of what it is given, hence the difference.
            said = decode(tokens + new, special=True)[len(decode(tokens, special=True)) :]
            self._messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
            self._text = written + said
            self._tokens = tokens + new
