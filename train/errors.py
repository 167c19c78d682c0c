"""What only the user can mend, and how it is told: one sentence, of printable text."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """What only the user can mend, told in one sentence; the command line prints it and exits with ``exit_code``."""

    exit_code = 2


class StoppedError(UserError):
    """What ended from outside and may well go on later, told likewise."""

    exit_code = 143


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the one of ``names`` most like ``name``, or ``"."`` if none is."""
    known = {entry.lstrip("-"): entry for entry in names}  # dashes alone are no likeness
    found = difflib.get_close_matches(name[:100].lstrip("-"), known, n=1, cutoff=0.65)
    return f"; did you mean {known[found[0]]!r}?" if found else "."


def shown(value: Any) -> str:
    """``repr(value)``, shortened: what a sentence quotes may come from a file and be of any size."""
    try:
        return printable(_SHORT.repr(value), 100)
    except ValueError:  # Python prints no number of more than 4300 digits
        return f"a value of type {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def printable(text: str, limit: int = 1000) -> str:
    """``text`` in one line without control characters, which a terminal would obey, and of at most ``limit`` characters.

    File names, class names and options may hold anything.
    """
    text = " ".join(text[: 2 * limit].splitlines())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
