"""The text that every machine has: the running Python's own modules and their docstrings."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_jax.data.files import TextFile, is_unicode

logger = logging.getLogger(__name__)

# Tests and installed packages are not what one means by the standard library. `pydoc_data` and
# `encodings` are generated: one file of escaped prose, longer than all other held-out files
# together, and a hundred near copies of one table. The sysconfig files say where this one Python
# was built, so no two machines would have the same data.
_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
    + ("pydoc_data", "encodings")
)
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")


@functools.cache
def code(root: str) -> tuple[TextFile, ...]:
    """The modules under `root`, the folder of a standard library, in order of their names."""
    readers = []
    for folder, folders, names in os.walk(root):
        folders[:] = filter(_keeps, folders)
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and _keeps(name) and _is_readable(path):
                readers.append(TextFile(path, path.relative_to(root).as_posix()))
    return tuple(sorted(readers, key=lambda reader: reader.origin))


@functools.cache
def docs(root: str) -> tuple[TextFile, ...]:
    """The docstrings of each of those modules, blank where it has none.

    Parsing a standard library takes two seconds, so its docstrings are kept in
    `$XDG_CACHE_HOME/lightning_jax` (`~/.cache/lightning_jax`) until a module changes.
    """
    modules = code(root)
    kept = _cache_file(modules)
    texts = _read_cache(kept, len(modules))
    if texts is None:
        texts = [docstrings(module.read(0)) for module in modules]
        _write_cache(kept, texts)
    return tuple(
        TextFile(module.path, module.origin, text=text)
        for module, text in zip(modules, texts, strict=True)
    )


def _keeps(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIXES)


def _is_readable(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def _cache_file(modules: tuple[TextFile, ...]) -> Path:
    """A name that changes with this file, the Python and the size or time of any module."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode())
    for module in modules:
        status = os.stat(module.path)
        digest.update(f"{module.path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "lightning_jax" / f"stdlib_docs_{digest.hexdigest()[:16]}.json"


def _read_cache(path: Path, count: int) -> list[str] | None:
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(texts, list) and len(texts) == count
    return texts if good and all(isinstance(text, str) for text in texts) else None


def _write_cache(path: Path, texts: list[str]) -> None:
    if not path.is_absolute():  # no home folder
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(texts), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.debug("docstrings are not kept in %s: %s", path, error)


def docstrings(code: str) -> str:
    """Docstrings of a module, its classes and functions in order of appearance, blank line between.

    Empty where there are none or `code` does not parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    found = (ast.get_docstring(node) for node in _documented(module))
    return "\n\n".join(text for text in found if text and is_unicode(text))


def _documented(node: ast.AST) -> Iterator[Any]:
    """Nodes that may have a docstring, in order of appearance; expressions are not walked."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, field, ())
        for child in children if isinstance(children, list) else ():
            yield from _documented(child)
