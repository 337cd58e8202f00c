"""``chat``: a conversation on a terminal, or over a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from types import FrameType

from ..engine import Conversation, Engine, SamplingParams
from ..errors import UserError
from .generate import sampling, stats_rows
from .output import errors, screen, table

__all__ = ["run_chat"]

HELP = """\
/help   this text
/stats  speeds, and how full the context is
/reset  forget the conversation
/exit   leave (so does Ctrl-D)
Ctrl-C  stop the answer"""


def run_chat(
    directory: Path,
    *,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    system: str | None,
    kv_tokens: int | None,
) -> None:
    """Talks until /exit or the end of the input."""
    engine = Engine.load(directory, kv_tokens=kv_tokens)
    params = sampling(engine, max_tokens, temperature, top_p, seed)
    Chat(engine, Conversation(engine, system), params).run()


class Chat:
    """Reads lines, runs commands, prints answers."""

    def __init__(self, engine: Engine, conversation: Conversation, params: SamplingParams) -> None:
        self._engine = engine
        self._conversation = conversation
        self._params = params
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._reading = False
        self._stop = False

    def run(self) -> None:
        """Answers until /exit or the end of the input."""
        _ = self._engine.tokenizer  # refuses a model without one before the first question
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() a history
            model = self._engine.manifest.model.get("architecture", "model")
            screen.print(
                f"[dim]{model}, {self._engine.manifest.attention}; /help lists commands[/]"
            )
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            while (line := self._read()) is not None:
                text = line.strip()
                if text in ("/exit", "/quit"):
                    return
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self._answer(text)
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C: ends a line that is being typed, or asks the answer to stop.

        The latter only by a flag: an exception could strike in the middle of a forward pass.
        """
        self._stop = True
        if self._reading:
            raise KeyboardInterrupt

    def _read(self) -> str | None:
        """The next line, or None at the end of the input."""
        while True:
            try:
                self._reading = True
                return input("> " if self._interactive else "")
            except EOFError:
                if self._interactive:
                    print()
                return None
            except KeyboardInterrupt:
                if not self._interactive:
                    return None
                print()
                screen.print("[dim]/exit or Ctrl-D leaves[/]")
            finally:
                self._reading = self._stop = False

    def _command(self, text: str) -> None:
        if text == "/help":
            print(HELP)
        elif text == "/reset":
            self._conversation.reset()
            screen.print("[dim]The conversation is forgotten.[/]")
        elif text == "/stats":
            limit = self._engine.max_prompt_tokens + 1
            rows = [
                ["context", f"{self._conversation.tokens} of {limit} tokens"],
                ["in the KV cache", f"{self._conversation.cached_tokens} tokens"],
                *stats_rows(self._engine, []),
            ]
            screen.print(table("Statistics", ["what", "value"], rows))
        else:
            screen.print(f"There is no command {text.split()[0]}; /help lists them.", markup=False)

    def _answer(self, text: str) -> None:
        try:
            stream = self._conversation.ask(text, self._params)
        except UserError as error:
            errors.print(f"{error} /reset begins a new conversation.", markup=False)
            return
        reason = None
        shown = False
        with contextlib.closing(stream):
            for delta in stream:
                # Many models begin an answer with a space, which belongs to the template.
                piece = delta.text if shown else delta.text.lstrip()
                shown = shown or bool(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
                reason = delta.finish_reason
                if self._stop:
                    break
        print(" [stopped]" if reason is None else "")
        if reason == "context":
            errors.print(
                "The context is full, so the answer ends here. /reset begins a new conversation.",
                markup=False,
            )
        elif reason == "length":
            errors.print(
                f"The answer was cut at {self._params.max_tokens} tokens (--max-tokens).",
                markup=False,
            )
