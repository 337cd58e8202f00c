"""The one exception that stands for a mistake of the user's."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """Something the user gave can't be used: a path, an option, a prompt.

    Its message is one sentence that says what was given and what is accepted. The command line
    prints it without a traceback and exits with code 2.
    """
