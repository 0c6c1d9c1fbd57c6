"""The page docs/config.md: every field of configs/base.py, with what the code knows of it.

Names, defaults and meanings come from the file itself and its comments, types from the dataclasses,
and what a field may be from the checks: each is shown a value that it refuses, and says what would
be right.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import io
import re
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import base
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build

SOURCE = Path(base.__file__)
# Functions of configs/base.py whose fields belong to every entry of a mapping.
_ENTRIES = {"stage": "stages.*", "source": "data.sources.*"}
# What is refused of a type, the most telling first.
_WRONG: dict[type, tuple[Any, ...]] = {
    str: ("?", ""),
    int: (-2, 2**60),
    float: (-2.0, 0.0),
    tuple: ({},),
}
_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    tuple: "a mapping from name to number",
}
_HEADINGS = {
    "": "The run",
    "model": "Model",
    "model.attention": "Attention",
    "model.attention.rope_scaling": "RoPE scaling",
    "model.moe": "Experts",
    "optimizer": "Optimizer",
    "stages.*": "Stages",
    "data": "Data",
    "data.sources.*": "Sources",
    "mesh": "Mesh",
}
_NONE = object()  # a field without a default
_TOP = """# Config fields

Every field of a run, generated from `configs/base.py` and the checks of `lightning_jax.config` by
`make docs-reference`. A config file returns these fields; a flag `--config.FIELD=VALUE` changes one
of them for one command. `*` stands for the name of a stage or a source: its learning rate is
`--config.stages.stable.learning_rate=1e-3`, not a field of the run. Defaults are those of
`configs/base.py`, which other configs change.
"""


@dataclasses.dataclass(frozen=True)
class Field:
    """A row of the page: `path` has a `*` for the name of a stage or a source."""

    path: str
    default: str
    meaning: str
    right: str


def fields() -> list[Field]:
    """All fields, in the order of configs/base.py."""
    meanings = dict(_meanings(SOURCE.read_text()))
    config = base.get_config()
    found = []
    for path, kind in _leaves(RunConfig):
        if path not in meanings:
            raise KeyError(f"configs/base.py: {path} has no line of its own with a comment")
        default, meaning = meanings[path]
        if default is None:
            default = _value(config, path)
        found.append(Field(path, _shown(default), meaning, _right(path, kind)))
    order = {path: number for number, path in enumerate(meanings)}
    return sorted(found, key=lambda field: order[field.path])


def page() -> str:
    """The text of docs/config.md."""
    parts, lines = dict.fromkeys(_HEADINGS, ""), fields()
    for field in lines:
        group = field.path.rpartition(".")[0]
        cells = (f"`{field.path}`", field.default, field.meaning, field.right)
        parts[group] += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    top = "\n\n| field | default | what it is | may be |\n|---|---|---|---|\n"
    return _TOP + "".join(f"\n## {_HEADINGS[group]}{top}{rows}" for group, rows in parts.items())


def _leaves(cls: type, at: str = "") -> Iterator[tuple[str, type]]:
    """Paths and types of all fields below a config dataclass."""
    for name, hint in typing.get_type_hints(cls).items():
        path, origin = at + name, typing.get_origin(hint)
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, path + ".")
        elif origin is tuple and dataclasses.is_dataclass(inner := typing.get_args(hint)[0]):
            inside = _leaves(inner, path + ".*.")
            yield from (leaf for leaf in inside if leaf[0] != path + ".*.name")
        else:
            yield path, origin or hint


def _meanings(text: str) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Path -> (default, comment) by the assignments of configs/base.py.

    A default is None where the config itself has it. A comment is that behind the line, else that
    in the lines before it.
    """
    behind, before = _comments(text)
    homes = {"config": ""}
    for function in ast.parse(text).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            lines = range(node.lineno, node.end_lineno + 1) if hasattr(node, "lineno") else ()
            said = next((behind[line] for line in lines if line in behind), None)
            if function.name in _ENTRIES and isinstance(node, ast.Call):
                for keyword in node.keywords:
                    path = f"{_ENTRIES[function.name]}.{keyword.arg}"
                    if keyword.arg and behind.get(keyword.value.lineno):
                        default = _literal(keyword.value, function)
                        yield path, (default, behind[keyword.value.lineno])
            elif function.name == "get_config" and isinstance(node, ast.Assign):
                *names, target = node.targets
                if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
                    continue
                path = f"{homes[target.value.id]}{target.attr}"
                for name in names:
                    homes[name.id] = path + "."
                yield path, (None, said or before.get(node.lineno, ""))


def _comments(text: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those behind code, and those that fill the lines before one."""
    behind: dict[int, str] = {}
    before: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, words = token.start[0], token.string.lstrip("# ")
        if token.line[: token.start[1]].strip():
            behind[line] = words
        else:
            before[line + 1] = f"{before.pop(line, '')} {words}".strip()
    return behind, before


def _literal(node: ast.expr, function: ast.FunctionDef) -> Any:
    """The value of an argument: a constant, a parameter's default, or the words as written."""
    names = [argument.arg for argument in function.args.args]
    if isinstance(node, ast.Name) and node.id in names:
        given = names[len(names) - len(function.args.defaults) :]
        if node.id not in given:
            return _NONE
        node = function.args.defaults[given.index(node.id)]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _value(config: Any, path: str) -> Any:
    for key in filter(None, path.split(".")):
        config = config[key]
    return config


def _shown(value: Any) -> str:
    if value is _NONE:
        return "none"
    if isinstance(value, str) and re.fullmatch(r"\w+\(.*\)", value):  # a mapping, as written
        return f"`{value}`"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"`{value!r}`"
    return f"`{value:,}`" if isinstance(value, int) else f"`{value:g}`"


def _right(path: str, kind: type) -> str:
    """What the checks say to a value that they refuse."""
    name = path.replace("stages.*", "stages.stable").replace("sources.*", "sources.code")
    values = base.get_config().to_dict(preserve_field_references=False)
    for wrong in _WRONG.get(kind, ()):
        changed = copy.deepcopy(values)
        parent, _, leaf = name.rpartition(".")
        _value(changed, parent)[leaf] = wrong
        try:
            build(RunConfig, changed)
        except UserError as error:
            where, _, right = str(error).partition(": must be ")
            if right and where.startswith(f"{name} = "):
                return _general(right, values, name)
    return _PLAIN[kind]


def _general(right: str, values: dict[str, Any], name: str) -> str:
    """The words of a check without what is true of configs/base.py and the wrong value alone."""
    right = re.sub(r"(\b[a-z_]+(?: - [a-z_]+)?) = -?[\d.]+", r"\1", right)
    right = re.sub(r" \(letter 0 is .*\)", "", right)
    right = right.replace(str(2**53), "2^53").replace(str(2**32 - 1), "2^32 - 1")
    may_be_empty = right.startswith("one of ") and _value(values, name) == ""
    return "empty, or " * may_be_empty + right
