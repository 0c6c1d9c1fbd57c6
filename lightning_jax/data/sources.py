"""Where text comes from: random access to the documents of a run's sources, opened once.

`path` is `stdlib:code` (the running Python's own modules), `stdlib:docs` (their docstrings, one
document per module), or a path or glob (`**` recurses) of `.txt`, `.md` and `.py` files (one
document per file), `.jsonl`, `.jsonl.gz`, `.parquet` and `.array_record` files (one per record).

Documents are in order of relative file name, then record. Only the hash of that name (and record)
decides whether a document is held out, so code and docstrings of one module fall on the same side,
and a file that is added moves no other. Documents are read when asked for; memory holds some tens
of bytes per document. The first start keeps an index of the files (see `index`), so that later
starts only check whether they changed.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.config import DataConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require, suggest
from lightning_jax.data import stdlib
from lightning_jax.data.cache import user_folder
from lightning_jax.data.files import ArrayRecordFile, GzipLinesFile, JsonLinesFile, ParquetFile
from lightning_jax.data.index import IndexStore
from lightning_jax.data.text_files import FoundFile, find_files, open_texts

TEXT_SUFFIXES = (".txt", ".md", ".py")
RECORD_FILES: dict[str, Any] = {
    ".jsonl": JsonLinesFile,
    ".jsonl.gz": GzipLinesFile,
    ".parquet": ParquetFile,
    ".array_record": ArrayRecordFile,
}
SPLITS = ("train", "eval")
# Documents in the first block of `hash_order`; each later block takes it this many times further.
_FIRST_BLOCK, _GROWTH = 1024, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Documents of one split of one source: `len`, and `[i]` gives `{"text", "origin"}`.

    `origin` is the relative file name, with `:record` (counted from 1) in record files. Fits
    `grain.sources.RandomAccessDataSource`, and pickles.

    Attributes:
      name: of the source.
      readers: its files, see `files`.
      members: [documents], their numbers among the records of all readers, ascending.
    """

    name: str
    readers: tuple[Any, ...]
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        return f"Source({self.name}, {len(self)} documents)"

    def __getitem__(self, document: int) -> dict[str, str]:
        reader, record = self._find(document)
        return {"text": reader.read(record), "origin": reader.label(record)}

    def origin(self, document: int) -> str:
        reader, record = self._find(document)
        return reader.label(record)

    def texts(self) -> Iterator[str]:
        return (self[document]["text"] for document in range(len(self)))

    def hash_order(self) -> Iterator[int]:
        """Document numbers in the order of a hash, the same on every machine.

        Taking only its beginning does not sort all documents.
        """
        shares = self._gather("share")
        given, count, below = 0, _FIRST_BLOCK, -1.0
        while given < len(self):
            last = min(count, len(self)) - 1
            limit = np.partition(shares, last)[last]
            block = np.flatnonzero((shares > below) & (shares <= limit))
            yield from block[np.argsort(shares[block], kind="stable")].tolist()
            given, count, below = given + len(block), count * _GROWTH, limit

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of names and contents of all files, and of the choice of this split.

        Raises:
          UserError: a document of the split that cannot be read.
        """
        self._require_readable()
        digest = hashlib.sha256(b"".join(reader.digest for reader in self.readers))
        is_member = np.zeros(self._starts[-1], bool)
        is_member[self.members] = True
        digest.update(np.packbits(is_member))
        return digest.hexdigest()

    @functools.cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts.

        Raises:
          UserError: a document of the split that cannot be read.
        """
        self._require_readable()
        return int(self._gather("size").sum())

    def _require_readable(self) -> None:
        for document in np.flatnonzero(self._gather("size") < 0):
            self[document]

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """[readers + 1], the number of each reader's first record, and the number of records."""
        return np.cumsum([0, *map(len, self.readers)])

    def _find(self, document: int) -> tuple[Any, int]:
        number = int(self.members[document])
        reader = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.readers[reader], number - int(self._starts[reader])

    def _gather(self, name: str) -> np.ndarray:
        """[documents], an attribute of their readers."""
        return _joined(self.readers, name)[self.members]


class Sources:
    """The sources of a run: `train[name]` and `eval[name]` are the splits, each a `Source`.

    A source is opened once, when it is first asked for: sources without weight in any stage, and
    those of a run that only generates, need not exist.

    With `eval_path` the train split is all of `path` and the eval split all of `eval_path`; without
    it, the share `eval_fraction` of the documents of `path` is held out, at least one.

    Asking for a source raises UserError where nothing matches, there is no text in it, a file is of
    an unknown kind or cannot be read, or there are too few documents to hold one out. A bad record
    raises when it is read.
    """

    def __init__(self, data: DataConfig, store: IndexStore) -> None:
        self.data, self._store = data, store
        self.train, self.eval = (_Split(self, split) for split in SPLITS)
        self._readers_of: dict[str, tuple[Any, ...]] = {}

    @classmethod
    def open(cls, data: DataConfig, cache: Path | None = None) -> Sources:
        """Returns the sources of a run.

        Args:
          data: names and paths.
          cache: folder where indexes are kept; None is the user's, see `index`.
        """
        return cls(data, IndexStore(cache or user_folder()))

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Returns, by source, `fingerprint` (sha256 of both splits) and the size of each split.

        The same documents under the same relative names give the same fingerprint on any machine.

        Raises:
          UserError: as opening; or a bad record.
        """
        result = {}
        for name in self.data.source_names:
            train, held_out = self.train[name], self.eval[name]
            both = f"{train.fingerprint}\n{held_out.fingerprint}"
            result[name] = {
                "fingerprint": hashlib.sha256(both.encode()).hexdigest(),
                "documents": len(train),
                "bytes": train.num_bytes,
                "eval_documents": len(held_out),
                "eval_bytes": held_out.num_bytes,
            }
        return result

    def _open(self, name: str, split: str) -> Source:
        source = next(source for source in self.data.sources if source.name == name)
        is_apart = bool(source.eval_path)
        kind = "eval_path" if is_apart and split == "eval" else "path"
        field, pattern = f"data.sources.{name}.{kind}", getattr(source, kind)
        if pattern not in self._readers_of:
            self._readers_of[pattern] = _readers(field, pattern, self.data.text_field, self._store)
        readers = self._readers_of[pattern]
        has_text = _joined(readers, "has_text")
        if not has_text.any():
            raise UserError(f"{field} = {pattern!r}: has no text in it")
        if not is_apart:
            is_eval = _held_out(_joined(readers, "share"), self.data.eval_fraction)
            has_text &= is_eval == (split == "eval")
        members = np.flatnonzero(has_text)
        if not len(members):
            raise UserError(
                f"{field} = {pattern!r}: too few documents to hold one out; set "
                f"data.sources.{name}.eval_path"
            )
        return Source(name, readers, members)


class _Split(Mapping[str, Source]):
    """One split of every source by name, opened when asked for."""

    def __init__(self, sources: Sources, split: str) -> None:
        self._sources, self._split = sources, split
        self._opened: dict[str, Source] = {}

    def __getitem__(self, name: str) -> Source:
        if name not in self._sources.data.source_names:
            raise KeyError(name)
        if name not in self._opened:
            self._opened[name] = self._sources._open(name, self._split)
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources.data.source_names)

    def __len__(self) -> int:
        return len(self._sources.data.sources)


def _joined(readers: Sequence[Any], name: str) -> np.ndarray:
    return np.concatenate([getattr(reader, name) for reader in readers])


def _held_out(shares: np.ndarray, eval_fraction: float) -> np.ndarray:
    is_eval = shares < eval_fraction
    if len(shares) >= 2:
        is_eval[np.argmin(shares)] = True
        is_eval[np.argmax(shares)] = False
    return is_eval


def _readers(field: str, pattern: str, text_field: str, store: IndexStore) -> tuple[Any, ...]:
    if pattern.startswith("stdlib:"):
        kinds = {"stdlib:code": stdlib.code, "stdlib:docs": stdlib.docs}
        require(pattern in kinds, field, pattern, suggest(pattern, [*kinds]))
        return (kinds[pattern](sysconfig.get_path("stdlib"), store),)
    expanded = os.path.expanduser(pattern)
    root = _fixed_part(expanded)
    found = find_files(root, glob.iglob(expanded, recursive=True))
    inside = f" (to read a folder: {pattern.rstrip('/')}/**)" if os.path.isdir(expanded) else ""
    require(bool(found), field, pattern, f"a path or a glob that matches a file{inside}")
    for file in found:
        if not _kind(file):
            known = ", ".join((*TEXT_SUFFIXES, *RECORD_FILES))
            raise UserError(f"{field}: {file.path} is of no known kind: {known}")
    readers: list[Any] = []
    for is_text, group in itertools.groupby(found, lambda file: _kind(file) in TEXT_SUFFIXES):
        files = [*group]
        if is_text:
            key = f"{os.path.abspath(expanded)} from {files[0].name}"
            readers.append(open_texts(root, files, store, key))
        else:
            for file in files:
                kind = RECORD_FILES[_kind(file)]
                readers.append(kind(Path(file.path), file.name, text_field, store))
    return tuple(readers)


def _kind(file: FoundFile) -> str:
    suffix = os.path.splitext(file.path)[1]
    if suffix in TEXT_SUFFIXES:
        return suffix
    return next((suffix for suffix in RECORD_FILES if file.name.endswith(suffix)), "")


def _fixed_part(pattern: str) -> Path:
    folder = Path(pattern).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return folder
