"""What a value from outside may be: its type and range, and the words for what would be right.

A table from key to `Kind` describes an object of somebody else's file; `check` compares the object
with the table in one place, so that the code that reads the file can take its values as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_jax.config.errors import UserError, suggest

# Sizes, ids and counts of one array: what an int32 holds.
LARGEST_INDEX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Kind:
    """`accepts(value)` says whether a value is of this kind; `right` describes such values."""

    right: str
    accepts: Callable[[Any], bool]


def integer(low: int, high: int = LARGEST_INDEX) -> Kind:
    """A whole number in [low, high]; True and False are none."""
    return Kind(
        f"a whole number in [{low}, {high}]",
        lambda value: type(value) is int and low <= value <= high,
    )


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Kind:
    """A finite number in [low, high], or in (low, high] with `above`."""

    def accepts(value: Any) -> bool:
        if type(value) not in (int, float) or not low <= value <= high:
            return False
        return _is_finite(value) and not (above and value == low)

    bounds = f" in {'(' if above else '['}{low:g}, {high:g}]"
    return Kind("a finite number" + bounds * (low > -math.inf or high < math.inf), accepts)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


TEXT = Kind("a string", lambda value: type(value) is str)
FLAG = Kind("true or false", lambda value: type(value) is bool)
OBJECT = Kind("an object", lambda value: type(value) is dict)


def choice(options: Sequence[str]) -> Kind:
    """One of some strings."""
    return Kind(f"one of {', '.join(options)}", lambda value: value in options)


def list_of(kind: Kind) -> Kind:
    """A list whose entries are all of one kind."""
    return Kind(
        f"a list; each entry {kind.right}",
        lambda value: type(value) is list and all(map(kind.accepts, value)),
    )


def map_of(kind: Kind) -> Kind:
    """An object whose values are all of one kind."""
    return Kind(
        f"an object; each value {kind.right}",
        lambda value: type(value) is dict and all(map(kind.accepts, value.values())),
    )


def either(*kinds: Kind) -> Kind:
    """Any of some kinds."""
    return Kind(
        " or ".join(kind.right for kind in kinds),
        lambda value: any(kind.accepts(value) for kind in kinds),
    )


def or_null(kind: Kind) -> Kind:
    """Of one kind, or null."""
    return Kind(f"{kind.right}, or null", lambda value: value is None or kind.accepts(value))


def check(
    values: Mapping[str, Any], kinds: Mapping[str, Kind], where: object, *, required: Sequence[str]
) -> None:
    """Compares the values of those keys that are in both, and looks for the required keys.

    Raises:
      UserError: names the file or object `where`, the key, its value, and what would be right.
    """
    for key in required:
        if key not in values:
            raise UserError(f"{where}: lacks {key}" + _meant(key, values))
    for key, kind in kinds.items():
        if key in values and not kind.accepts(values[key]):
            raise UserError(f"{where}: {key} = {shorten(values[key])}: must be {kind.right}")


def shorten(value: object, limit: int = 80) -> str:
    """Returns the repr of a value, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _meant(key: str, values: Mapping[str, Any]) -> str:
    return f"; it has {suggest(key, list(values)[:20])}" if values else "; it is empty"
