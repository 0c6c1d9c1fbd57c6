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

import dataclasses
import functools
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.config import SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require, suggest
from lightning_jax.data import stdlib
from lightning_jax.data.files import (
    ArrayRecordFile,
    JsonLinesFile,
    ParquetFile,
    TextFile,
)

TEXT_SUFFIXES = (".txt", ".md", ".py")
SPLITS = ("train", "eval")


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
        kinds = {"stdlib:code": stdlib.code, "stdlib:docs": stdlib.docs}
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
        return TextFile(path, origin)
    records = {
        ".jsonl": JsonLinesFile,
        ".jsonl.gz": JsonLinesFile,
        ".parquet": ParquetFile,
        ".array_record": ArrayRecordFile,
    }
    for suffix, kind in records.items():
        if path.name.endswith(suffix):
            return kind(path, origin, text_field)
    raise UserError(
        f"{field}: {path} is of no known kind: {', '.join(TEXT_SUFFIXES + tuple(records))}"
    )
