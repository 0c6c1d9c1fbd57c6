"""Checks of single fields, and frozen dataclasses from nested mappings and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_jax.config.errors import UserError, suggest


def require(condition: bool, field: str, value: object, right: str) -> None:
    """Raises the one-line `UserError` of this project unless `condition` holds."""
    if not condition:
        raise UserError(f"{field} = {value!r}: must be {right}")


def require_choice(field: str, value: str, options: Sequence[str]) -> None:
    """Raises `UserError`, with a "did you mean", unless `value` is one of `options`."""
    require(value in options, field, value, suggest(value, options))


def build(cls: type, values: Mapping[str, Any], *, path: str = "") -> Any:
    """Builds the frozen dataclass `cls` from a ConfigDict or a nested mapping.

    A field of type `tuple[SomeConfig, ...]` is written as a mapping from name to fields, in order;
    `tuple[tuple[str, float], ...]` as a mapping from name to number.

    Raises:
      UserError: an unknown key (with a "did you mean"), a missing key, a wrong type, or a value
        that the dataclass refuses.
    """
    types = typing.get_type_hints(cls)
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


def _require_mapping(value: Any, field: str, right: str) -> None:
    # A ConfigDict is no Mapping.
    require(isinstance(value, Mapping) or hasattr(value, "items"), field, value, right)


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path=path + ".")
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        _require_mapping(value, path, "a mapping from name to value")
        pairs = [(name, entry) for name, entry in value.items() if entry is not None]
        if dataclasses.is_dataclass(item):
            for name, entry in pairs:
                _require_mapping(entry, f"{path}.{name}", "a mapping of fields")
            return tuple(
                build(item, {"name": name, **dict(entry.items())}, path=f"{path}.{name}.")
                for name, entry in pairs
            )
        return tuple((name, _convert(float, entry, f"{path}.{name}")) for name, entry in pairs)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    matches = type(value) is kind
    require(matches, path, value, f"of type {kind.__name__}")
    return value


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
