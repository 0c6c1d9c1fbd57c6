"""The exception for bad input, and how all messages list names and say "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Bad input: a config field, a file, a checkpoint, a full disk.

    Its message is one line that names the field, its value and a right value. Programs in
    `experiments/` print that line and exit with status 2; any other exception that escapes is our
    bug and shows its traceback.
    """


def did_you_mean(value: object, options: Iterable[str]) -> str:
    """Returns ` (did you mean "b"?)` where an option is close to `value`, else nothing."""
    close = difflib.get_close_matches(str(value), list(options), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Returns `a, b, c`, and how many more names there are beyond `most`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def suggest(value: object, options: Iterable[str]) -> str:
    """Returns `one of a, b, c`, followed by the option that `value` was meant to be, if any."""
    options = list(options)
    return f"one of {', '.join(options)}{did_you_mean(value, options)}"
