"""The tokenizer and chat template of a compiled directory, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

__all__ = ["Message", "Tokenizer"]

Message = Mapping[str, str]
"""``{"role": "user" | "assistant" | "system", "content": text}``"""


class Tokenizer:
    """Text to token ids and back.

    Attributes
    ----------
    has_chat_template: whether ``render`` can write a conversation.
    """

    def __init__(self, directory: Path) -> None:
        """Reads ``tokenizer.json`` and, where there is one, the chat template.

        Raises UserError if the directory has no readable tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{directory} has no tokenizer.json, so text can't be turned into tokens; "
                "its checkpoint came without a tokenizer."
            )
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the binding raises bare Exception for any damage
            raise UserError(f"{path} can't be read as a tokenizer: {error}.") from error
        self._config = _read_config(directory / "tokenizer_config.json")
        self._template = _chat_template(directory, self._config)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; ``special`` adds what the model wants around a plain prompt."""
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; ``special`` keeps special tokens, as they are written."""
        return str(self._backend.decode(list(ids), skip_special_tokens=not special))

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the chat template writes it, up to where the model answers.

        Raises UserError if there is no template or it refuses the conversation.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self._template is None:
            raise UserError("This model has no chat template.")
        # The environment that transformers gives to templates, which are written for it.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        special = {k: _content(v) for k, v in self._config.items() if k.endswith("_token") and v}
        try:
            return environment.from_string(self._template).render(
                messages=[dict(m) for m in messages], add_generation_prompt=True, **special
            )
        except jinja2.TemplateError as error:
            raise UserError(f"The model's chat template refused the conversation: {error}.") from (
                error
            )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    return config if isinstance(config, dict) else {}


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: Any) -> str:
    """A special token is a string, or an object that holds one."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own tojson escapes for HTML, which templates for models don't expect.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    import datetime

    return datetime.datetime.now().strftime(format)
