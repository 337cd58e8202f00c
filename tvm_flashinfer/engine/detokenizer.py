"""Text from tokens as they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["StopStrings", "StreamingDetokenizer"]

# What a decoder puts where bytes don't (yet) form a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamingDetokenizer:
    """Turns a growing list of token ids into text, piece by piece.

    A token may end inside a UTF-8 character, and a decoder may strip or add a space at the start
    of what it is given. So a piece is the difference of two decodings of a short window of
    tokens, and it is kept back while it ends in the middle of a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # ids[_context:_done] have been given out; they are decoded again as left context.
        self._context = 0
        self._done = 0

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that became certain (may be empty)."""
        self._ids.append(token_id)
        return self._take(final=False)

    def finish(self) -> str:
        """The text kept back, once no more tokens come."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._done])
        after = self._decode(self._ids[self._context :])
        if not final and after.endswith(_REPLACEMENT):
            return ""
        piece = after[len(before) :]
        if piece or final:
            self._context = self._done
            self._done = len(self._ids)
        return piece


class StopStrings:
    """Cuts a stream of text before the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Returns what can be shown: all but a possible beginning of a stop string."""
        if not self._stops or self.found:
            return "" if self.found else text
        text = self._held + text
        hits = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ends ``text``."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
