"""Where text comes from: random access to the documents of one source, split into train and eval.

`path` is `stdlib:code` (the running Python's own modules), `stdlib:docs` (their docstrings, one
document a module), or a path or glob (`**` recurses) of `.txt`, `.md` and `.py` (a document a
file), `.jsonl`, `.jsonl.gz`, `.parquet` and `.array_record` (a document a record) files.

Documents are in order of relative file name, then record. Whether one is held out depends on the
hash of that name (and record) alone, so code and docstrings of one module fall on the same side,
and a file that is added moves no other. Files of text and `.jsonl` are read when asked for;
`.jsonl.gz` and the text column of `.parquet` are held in memory.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import glob
import gzip
import hashlib
import importlib
import json
import os
import sysconfig
import warnings
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.config import SourceConfig, require, suggest
from lightning_jax.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py")
SPLITS = ("train", "eval")
# Tests and installed packages are not what one means by the standard library. `pydoc_data` and
# `encodings` are generated: one file of escaped prose, longer than all other held-out files
# together, and a hundred near copies of one table. The sysconfig files say where this one Python
# was built, so no two machines would have the same data.
_STDLIB_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
    + ("pydoc_data", "encodings")
)
_STDLIB_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")


def optional_import(name: str) -> Any:
    """Imports a package of the `data` extra, or says in one line how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"package {name.partition('.')[0]} is missing: pip install lightning_jax[data]"
        ) from error


class _File:
    """A file of records that are read by number; `origin` is its relative name."""

    is_blank = False

    def __init__(self, path: Path, origin: str, text_field: str = "") -> None:
        self.path, self.origin, self.text_field = path, origin, text_field

    def label(self, record: int) -> str:
        return f"{self.origin}:{record + 1}"


class _TextFile(_File):
    """A file that is one document: its content, or the `text` that was made of it."""

    def __init__(self, path: Path, origin: str, text_field: str = "", text: str | None = None):
        super().__init__(path, origin, text_field)
        self._text = text
        self.is_blank = not (path.stat().st_size if text is None else text)

    def __len__(self) -> int:
        return 1

    def label(self, record: int) -> str:
        return self.origin

    def read(self, record: int) -> str:
        if self._text is not None:
            return self._text
        return _decoded(self.path.read_bytes(), str(self.path))


class _JsonLines(_File):
    """One record a line; blank lines are none. Holds offsets, or all lines of a gzip file."""

    def __init__(self, path: Path, origin: str, text_field: str) -> None:
        super().__init__(path, origin, text_field)
        is_gzip = path.suffix == ".gz"
        starts, lengths, numbers, offset = array("q"), array("q"), array("q"), 0
        held: list[bytes] = []
        try:
            with gzip.open(path, "rb") if is_gzip else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        starts.append(offset)
                        lengths.append(len(line))
                        numbers.append(number)
                        held += [line] if is_gzip else []
                    offset += len(line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: not a complete gzip file ({error})") from error
        self._starts, self._lengths, self._numbers = starts, lengths, numbers
        self._held = held if is_gzip else None

    def __len__(self) -> int:
        return len(self._starts)

    def label(self, record: int) -> str:
        return f"{self.origin}:{self._numbers[record]}"

    def read(self, record: int) -> str:
        if self._held is not None:
            line = self._held[record]
        else:
            with open(self.path, "rb") as file:
                file.seek(self._starts[record])
                line = file.read(self._lengths[record])
        return _text_of(line, self.text_field, f"{self.path}, line {self._numbers[record]}")


class _Parquet(_File):
    """One record a row; only the text column is read."""

    def __init__(self, path: Path, origin: str, text_field: str) -> None:
        super().__init__(path, origin, text_field)
        parquet, arrow = optional_import("pyarrow.parquet"), optional_import("pyarrow")
        try:
            names = parquet.read_schema(path).names
            if text_field not in names:
                raise UserError(
                    f"data.text_field = {text_field!r}: no such column in {path}: "
                    f"{suggest(text_field, names)}"
                )
            self._column = parquet.read_table(path, columns=[text_field]).column(text_field)
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable parquet file ({error})") from error

    def __len__(self) -> int:
        return len(self._column)

    def read(self, record: int) -> str:
        text = self._column[int(record)].as_py()
        return _checked(text, self.text_field, f"{self.path}, row {record + 1}")


class _ArrayRecord(_File):
    """One record each; JSON objects where the first record is one, else UTF-8 text."""

    def __init__(self, path: Path, origin: str, text_field: str) -> None:
        super().__init__(path, origin, text_field)
        module = optional_import("array_record.python.array_record_data_source")
        try:
            self._records = module.ArrayRecordDataSource([str(path)])
            first = self._records[0] if len(self._records) else b""
        except Exception as error:  # The library raises RuntimeErrors and ValueErrors of all kinds.
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a readable array_record file ({reason})") from error
        try:
            self._is_json = isinstance(json.loads(first), dict)
        except ValueError:
            self._is_json = False

    def __len__(self) -> int:
        return len(self._records)

    def read(self, record: int) -> str:
        content, place = self._records[int(record)], f"{self.path}, record {record + 1}"
        if self._is_json:
            return _text_of(content, self.text_field, place)
        return _decoded(content, place)


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}") from error


def _text_of(content: bytes, text_field: str, place: str) -> str:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: must be a JSON object, not {type(record).__name__}")
    if text_field not in record:
        raise UserError(
            f"{place}: no field data.text_field = {text_field!r}: {suggest(text_field, [*record])}"
        )
    return _checked(record[text_field], text_field, place)


def _checked(text: object, text_field: str, place: str) -> str:
    if not isinstance(text, str):
        raise UserError(
            f"{place}: data.text_field = {text_field!r} must be a string, not {type(text).__name__}"
        )
    if not _is_unicode(text):
        raise UserError(f"{place}: data.text_field = {text_field!r} has an unpaired surrogate")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Documents of one split of one source: `len`, and `[i]` gives `{"text", "origin"}`.

    `origin` is the relative file name, with `:record` (counted from 1) in record files. Fits
    `grain.sources.RandomAccessDataSource`, and pickles.
    """

    name: str
    readers: tuple[Any, ...]
    index: np.ndarray  # [documents, 2]: reader, record

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"Source({self.name}, {len(self)} documents)"

    def __getitem__(self, document: int) -> dict[str, str]:
        reader, record = self.index[document]
        return {"text": self.readers[reader].read(record), "origin": self.origin(document)}

    def origin(self, document: int) -> str:
        reader, record = self.index[document]
        return self.readers[reader].label(record)

    def texts(self) -> Iterator[str]:
        return (self[document]["text"] for document in range(len(self)))

    def hash_order(self) -> list[int]:
        """Document numbers in an order that has nothing to do with names, the same everywhere."""
        return sorted(range(len(self)), key=lambda document: _share(self.origin(document)))

    @functools.cached_property
    def _totals(self) -> tuple[str, int]:
        total, digest = 0, hashlib.sha256()
        for document in range(len(self)):
            content = self[document]["text"].encode("utf-8")
            inner = hashlib.sha256(content).hexdigest()
            digest.update(f"{self.origin(document)}\0{len(content)}\0{inner}\n".encode())
            total += len(content)
        return digest.hexdigest(), total

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of origin, size and content of every document; reads them all, once."""
        return self._totals[0]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts; reads them all, once."""
        return self._totals[1]


def open_source(
    source: SourceConfig, *, split: str, text_field: str, eval_fraction: float
) -> Source:
    """Opens one split of a source.

    With `source.eval_path` the train split is all of `path` and the eval split all of `eval_path`;
    without it, the share `eval_fraction` of the documents of `path` is held out, at least one.

    Raises:
      UserError: nothing matches, no text in it, a file of an unknown kind or that cannot be read,
        or too few documents to hold one out. A bad record raises when it is read.
    """
    require(split in SPLITS, "split", split, suggest(split, SPLITS))
    is_apart = bool(source.eval_path)
    name = "eval_path" if is_apart and split == "eval" else "path"
    field, pattern = f"data.sources.{source.name}.{name}", getattr(source, name)
    readers = _readers(field, pattern, text_field)
    sizes = [len(reader) for reader in readers]
    records = np.concatenate([np.arange(size) for size in sizes])
    index = np.stack([np.repeat(np.arange(len(sizes)), sizes), records], axis=1)
    if not is_apart:
        shares = [_share(readers[i].label(record)) for i, record in index]
        index = index[_held_out(np.array(shares), eval_fraction) == (split == "eval")]
    has_text = np.array([len(reader) > 0 and not reader.is_blank for reader in readers])
    if not has_text.any():
        raise UserError(f"{field} = {pattern!r}: has no text in it")
    index = index[has_text[index[:, 0]]]
    if not len(index):
        raise UserError(
            f"{field} = {pattern!r}: too few documents to hold one out; set "
            f"data.sources.{source.name}.eval_path"
        )
    return Source(source.name, tuple(readers), index)


def _share(label: str) -> float:
    return int.from_bytes(hashlib.sha256(label.encode("utf-8")).digest()[:8], "big") / 2**64


def _held_out(shares: np.ndarray, eval_fraction: float) -> np.ndarray:
    is_eval = shares < eval_fraction
    if len(shares) >= 2:
        is_eval[np.argmin(shares)] = True
        is_eval[np.argmax(shares)] = False
    return is_eval


def _readers(field: str, pattern: str, text_field: str) -> Sequence[Any]:
    if pattern.startswith("stdlib:"):
        kinds = {"stdlib:code": _stdlib_code, "stdlib:docs": _stdlib_docs}
        require(pattern in kinds, field, pattern, suggest(pattern, [*kinds]))
        return kinds[pattern](sysconfig.get_path("stdlib"))
    expanded = os.path.expanduser(pattern)
    paths = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if os.path.isfile(p))
    inside = f" (to read a folder: {pattern.rstrip('/')}/**)" if os.path.isdir(expanded) else ""
    require(bool(paths), field, pattern, f"a path or a glob that matches a file{inside}")
    root = _fixed_part(expanded)
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return [_reader(field, path, origin, text_field) for origin, path in named]


def _fixed_part(pattern: str) -> Path:
    folder = Path(pattern).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return folder


def _reader(field: str, path: Path, origin: str, text_field: str) -> Any:
    if path.suffix in TEXT_SUFFIXES:
        return _TextFile(path, origin)
    records = {
        ".jsonl": _JsonLines,
        ".jsonl.gz": _JsonLines,
        ".parquet": _Parquet,
        ".array_record": _ArrayRecord,
    }
    for suffix, kind in records.items():
        if path.name.endswith(suffix):
            return kind(path, origin, text_field)
    raise UserError(
        f"{field}: {path} is of no known kind: {', '.join(TEXT_SUFFIXES + tuple(records))}"
    )


def _stdlib_keeps(name: str) -> bool:
    return name not in _STDLIB_LEFT_OUT and not name.startswith(_STDLIB_LEFT_OUT_PREFIXES)


@functools.cache
def _stdlib_code(root: str) -> tuple[_TextFile, ...]:
    readers = []
    for folder, folders, names in os.walk(root):
        folders[:] = filter(_stdlib_keeps, folders)
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and _stdlib_keeps(name) and _is_readable(path):
                readers.append(_TextFile(path, path.relative_to(root).as_posix()))
    return tuple(sorted(readers, key=lambda reader: reader.origin))


def _is_readable(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


@functools.cache
def _stdlib_docs(root: str) -> tuple[_TextFile, ...]:
    return tuple(
        _TextFile(file.path, file.origin, text=docstrings(file.read(0)))
        for file in _stdlib_code(root)
    )


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


def _documented(node: ast.AST) -> Iterator[Any]:
    """Nodes that may have a docstring, in order of appearance; expressions are not walked."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, field, ())
        for child in children if isinstance(children, list) else ():
            yield from _documented(child)
