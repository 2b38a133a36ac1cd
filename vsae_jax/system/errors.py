"""Errors that are reported to the user in one line, with an exit status."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake. The message is one line: what was wrong, its value, what would
    be right, and how to go on. Commands print it and exit with status 2."""


class Interrupted(Exception):
    """Work that a signal stopped, after saving. Commands exit with 128 + signal."""

    def __init__(self, message: str, *, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


def one_line(error: BaseException) -> str:
    """The error's text on a single line, shortened to 400 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """`; did you mean NAME?` with the known name that is most alike, or ""."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def missing_extra(package: str, *, extra: str) -> UserError:
    """The error for an optional package that is not installed."""
    return UserError(
        f"{package} is not installed; install it with: pip install {package} (or, in "
        f"the folder of the clone: pip install -e '.[{extra}]')"
    )
