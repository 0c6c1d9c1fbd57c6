"""Checks of single fields, and frozen dataclasses from nested mappings and back.

What a value may be is decided here for every field alike: finite, and of a size that the arrays of
a run hold. A dataclass adds what its own fields need beyond that.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.kinds import LARGEST_INDEX, Kind, integer, shorten

# Counts over a whole run stay on the host, as integers that a float64 and JSON hold exactly.
LARGEST_COUNT = 2**53
Count = Annotated[int, integer(0, LARGEST_COUNT)]

# Normal numbers of float32: devices flush smaller ones to zero, and larger ones are infinite there.
_SMALLEST_FLOAT, _LARGEST_FLOAT = 1.18e-38, 3.4e38
_LONGEST_TEXT = 4096
_LONGEST_NAME = 100


def _is_float32(value: float) -> bool:
    # False for NaN, which is in no range.
    return value == 0 or _SMALLEST_FLOAT <= abs(value) <= _LARGEST_FLOAT


# By type: what a field may hold unless its annotation names another `Kind`.
_DEFAULTS = {
    bool: Kind("true or false", lambda value: True),
    int: integer(-LARGEST_INDEX, LARGEST_INDEX),
    float: Kind("a finite number that float32 holds", _is_float32),
    str: Kind(
        f"at most {_LONGEST_TEXT} characters, none of them NUL",
        lambda value: len(value) <= _LONGEST_TEXT and "\0" not in value,
    ),
}


def require(condition: bool, field: str, value: object, right: str) -> None:
    """Raises the one-line `UserError` of this project unless `condition` holds."""
    if not condition:
        # The repr of a ConfigDict has line ends.
        raise UserError(f"{field} = {' '.join(shorten(value, 400).split())}: must be {right}")


def require_choice(field: str, value: str, options: Sequence[str]) -> None:
    """Raises `UserError`, with a "did you mean", unless `value` is one of `options`."""
    if value not in options:  # What it may mean takes long to find.
        require(False, field, value, suggest(value, options))


def build(cls: type, values: Mapping[str, Any], *, path: str = "") -> Any:
    """Builds the frozen dataclass `cls` from a ConfigDict or a nested mapping.

    A field of type `tuple[SomeConfig, ...]` is written as a mapping from name to fields, in order;
    `tuple[tuple[str, float], ...]` as a mapping from name to number. Numbers are finite; a float
    is one that float32 holds, an int one that int32 holds unless its field is a `Count`.

    Raises:
      UserError: an unknown key (with a "did you mean"), a missing key, a wrong type, a number out
        of range, or a value that the dataclass refuses.
    """
    types = _types(cls)
    _require_mapping(values, path.rstrip(".") or "config", "a mapping of fields")
    known = [field.name for field in dataclasses.fields(cls)]
    given = dict(values.items())
    for key in given:
        if key not in known:
            raise UserError(f"unknown config field {path}{key}: {suggest(key, known)}")
    for key in known:
        if key not in given:
            raise UserError(f"config field {path}{key} is missing: configs/base.py has its default")
    return cls(**{key: _convert(types[key], given[key], path + key) for key in known})


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _require_mapping(value: Any, field: str, right: str) -> None:
    # A ConfigDict is no Mapping.
    require(isinstance(value, Mapping) or hasattr(value, "items"), field, value, right)


def _require_name(name: Any, path: str) -> None:
    # Names are joined by dots in the paths of fields and by slashes in those of metrics and files.
    fits = isinstance(name, str) and name.isprintable() and not set(name) & set("./\\")
    fits = fits and name == name.strip() and 0 < len(name) <= _LONGEST_NAME
    right = f"1 to {_LONGEST_NAME} printable characters without dots and slashes"
    require(fits, f"a name in {path}", name, right)


def _convert(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, path=path + ".")
    if typing.get_origin(kind) is tuple:
        return _convert_mapping(typing.get_args(kind)[0], value, path)
    limits = None
    if typing.get_origin(kind) is Annotated:
        kind, limits = typing.get_args(kind)
    if kind is float and type(value) is int and abs(value) < _LARGEST_FLOAT:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    require(type(value) is kind, path, value, f"of type {kind.__name__}")
    limits = limits or _DEFAULTS[kind]
    require(limits.accepts(value), path, value, limits.right)
    return value


def _convert_mapping(item: Any, value: Any, path: str) -> tuple[Any, ...]:
    _require_mapping(value, path, "a mapping from name to value")
    pairs = [(name, entry) for name, entry in value.items() if entry is not None]
    for name, _ in pairs:
        _require_name(name, path)
    if not (isinstance(item, type) and dataclasses.is_dataclass(item)):
        return tuple((name, _convert(float, entry, f"{path}.{name}")) for name, entry in pairs)
    for name, entry in pairs:
        _require_mapping(entry, f"{path}.{name}", "a mapping of fields")
        require("name" not in entry, f"{path}.{name}.name", entry.get("name"), "left out")
    return tuple(
        build(item, {"name": name, **dict(entry.items())}, path=f"{path}.{name}.")
        for name, entry in pairs
    )


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `build`: nested plain dicts, JSON-serialisable, tuples back to mappings."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            value = {
                item.name: {k: v for k, v in to_dict(item).items() if k != "name"} for item in value
            }
        elif isinstance(value, tuple):
            value = dict(value)
        result[field.name] = value
    return result


def changes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted field, old value, new value) of the differences of two nested dicts.

    A field that only one of them has is None in the other. The order of keys counts: it is the
    order of stages.
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield path, old, new
        return
    for key in dict.fromkeys([*old, *new]):
        yield from changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    if list(old) != list(new) and set(old) == set(new):
        yield path, list(old), list(new)


def first_change(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """Returns the first of the `changes`; None without any."""
    return next(changes(old, new), None)
