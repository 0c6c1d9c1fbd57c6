"""The page docs/api.md: public names with their signatures and what they compute."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import lightning_jax

# Modules whose public functions and classes users of the package call, and what they are for.
MODULES = {
    "lightning_jax.inspect": "Look inside a model while it reads a text.",
    "lightning_jax.infer.inspector": "What `lightning_jax.inspect.open` and `load_run` return.",
    "lightning_jax.infer.readings": "What an `Inspector` says of a text.",
    "lightning_jax.plots": "Figures of a model, of a run, and of what it does with a text.",
    "lightning_jax.accounting": "Parameters, FLOPs and cache bytes, from a config alone.",
    "lightning_jax.infer.sampling": "How a token is drawn.",
    "lightning_jax.data.tokenizer": "Text and tokens.",
}
_WIDTH = 88
# Of methods, and what flax adds to every module.
_LEFT_OUT = ("self", "parent", "name")
_TOP = """# Python API

The public names, generated from the code by `make docs-reference`. Each docstring has shapes, units
and the errors raised: `help(lightning_jax.run)`. A config is built from the mapping that a file of
`configs/` returns: `lightning_jax.config.build(lightning_jax.config.RunConfig, values)`.

## lightning_jax

These are imported when they are first used.
"""


def page() -> str:
    """The text of docs/api.md."""
    front = [
        _entry(f"lightning_jax.{name}", value)
        for name in sorted(lightning_jax.__all__)
        if not inspect.ismodule(value := getattr(lightning_jax, name))
    ]
    parts = [_TOP, *front]
    for name, about in MODULES.items():
        parts.append(f"## {name}\n\n{about}\n")
        module = importlib.import_module(name)
        parts += [_entry(f"{name}.{key}", value) for key, value in _own(module)]
    return "\n".join(parts)


def _own(module: Any) -> Iterator[tuple[str, Any]]:
    """Functions and classes that a package offers in `__all__`, or that a module defines."""
    for name in getattr(module, "__all__", vars(module)):
        value = getattr(module, name)
        is_own = getattr(value, "__module__", "").startswith(module.__name__) and name[:1] != "_"
        if is_own and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


def _entry(name: str, value: Any) -> str:
    lines = [
        f"### `{name.rpartition('.')[2]}`",
        "",
        "```text",
        _signature(name, value),
        "```",
        "",
        _about(value),
        "",
    ]
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if key.startswith("_") or not (
                inspect.isfunction(member) or isinstance(member, property)
            ):
                continue
            called = f".{key}" if isinstance(member, property) else _signature(f".{key}", member)
            lines += [f"- `{called}`: {_about(member)}"]
        lines.append("")
    return "\n".join(lines)


def _signature(name: str, value: Callable[..., Any]) -> str:
    """How it is called: one line, or one for each parameter where that is too long."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return name
    words, marks = [], {inspect.Parameter.KEYWORD_ONLY: "*"}
    for parameter in signature.parameters.values():
        if parameter.name in _LEFT_OUT:
            continue
        if mark := marks.pop(parameter.kind, None):
            words.append(mark)
        words.append(_parameter(parameter))
    given = signature.return_annotation
    result = "" if given in (inspect.Signature.empty, "None", None) else f" -> {_type(given)}"
    line = f"{name}({', '.join(words)}){result}"
    if len(line) <= _WIDTH or name.startswith("."):
        return line
    return "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){result}"])


def _parameter(parameter: inspect.Parameter) -> str:
    empty, stars = inspect.Parameter.empty, {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    text = stars.get(parameter.kind.name, "") + parameter.name
    if parameter.annotation is not empty:
        text += f": {_type(parameter.annotation)}"
    return text if parameter.default is empty else f"{text} = {parameter.default!r}"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _about(value: Any) -> str:
    """The first paragraph of a docstring, as one line."""
    text = inspect.getdoc(value) or ""
    return " ".join(text.split("\n\n")[0].split())
