"""Text that every machine has: the running Python's own modules and their docstrings.

The name of a module decides whether it is held out, so its code and its docstrings, which are part
of the code, are on the same side.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.data.globs import find_files
from lightning_jax.data.index import IndexStore, kept_name
from lightning_jax.data.text_files import HeldTexts, TextFiles, open_texts

# Tests and installed packages are no part of the standard library's text. `pydoc_data` and
# `encodings` are generated: one file of escaped prose, longer than all other held-out files
# together, and a hundred near copies of one table. The sysconfig files say where this one Python
# was built, so no two machines would have the same data.
_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
    + ("pydoc_data", "encodings")
)
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")


def code(root: str, store: IndexStore) -> TextFiles:
    """The modules under `root`, the folder of a standard library, in order of their names."""
    files = find_files(Path(root), _modules(root))
    key = f"modules of {root}"
    return open_texts(Path(root), files, store, key, readable=True, by_name=True)


def docs(root: str, store: IndexStore) -> HeldTexts:
    """The docstrings of each of those modules, blank where it has none.

    Parsing a standard library takes two seconds, so its docstrings are kept in the store until a
    module changes.
    """
    modules = code(root, store)
    this = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    name = kept_name("stdlib_docs", this, sys.version, modules.digest.hex())
    arrays = store.load(name)
    if arrays is None:
        texts = [docstrings(modules.read(i)).encode("utf-8") for i in range(len(modules))]
        ends = np.cumsum([0, *map(len, texts)])
        joined = np.frombuffer(b"".join(texts), np.uint8)
        arrays = store.keep(name, {"ends": ends, "texts": joined})
    return HeldTexts(modules, **arrays)


def _modules(root: str) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = filter(_keeps, folders)
        yield from (os.path.join(folder, n) for n in names if n.endswith(".py") and _keeps(n))


def _keeps(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIXES)


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
    return "\n\n".join(text for text in found if text and _is_unicode(text))


def _is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: it has no unpaired surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _documented(node: ast.AST) -> Iterator[Any]:
    """Nodes that may have a docstring, in order of appearance; expressions are not walked."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, field, ())
        for child in children if isinstance(children, list) else ():
            yield from _documented(child)
