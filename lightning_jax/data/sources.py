"""Where text comes from: random access to the documents of a run's sources, opened once.

`path` is `stdlib:code` (the running Python's own modules), `stdlib:docs` (their docstrings, one
document per module), `recall:TASK` (synthetic, see `recall`), or a path or glob (`**` recurses) of
`.txt`, `.md` and `.py` files (one document per file), `.jsonl`, `.jsonl.gz`, `.parquet` and
`.array_record` files (one per record). A folder is all files of these kinds below it.

Documents are in order of relative file name, then record. Each real file is read once, whatever
links lead to it (see `globs`), and what any source of a run holds out is trained on by none (see
`held_out`): their number is logged and part of `Sources.fingerprint`. Documents are read when asked
for; memory holds some tens of bytes per document. The first start keeps an index of the files (see
`index`), so that later starts only check whether they changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require, suggest
from lightning_jax.data import paths, recall, stdlib
from lightning_jax.data.cache import user_folder
from lightning_jax.data.globs import shown_name
from lightning_jax.data.held_out import HeldOut, choose, only_content, tail_start
from lightning_jax.data.index import BLANK, IndexStore, key_of
from lightning_jax.data.text_files import open_texts
from lightning_jax.runtime.phases import phase

logger = logging.getLogger(__name__)

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
      span: of a source that is one document, the bytes of its text that belong to this split.
    """

    name: str
    readers: tuple[Any, ...]
    members: np.ndarray
    span: slice | None = None

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        return f"Source({self.name}, {len(self)} documents)"

    def __getitem__(self, index: int) -> dict[str, str]:
        reader, record = self._find(index)
        text = reader.read(record)
        if self.span is not None:
            text = text.encode("utf-8")[self.span].decode("utf-8")
        return {"text": text, "origin": reader.label(record)}

    def origin(self, document: int) -> str:
        reader, record = self._find(document)
        return reader.label(record)

    def texts(self) -> Iterator[str]:
        return (self[document]["text"] for document in range(len(self)))

    def hash_order(self) -> Iterator[int]:
        """Document numbers in the order of a hash, the same on every machine.

        Taking only its beginning does not sort all documents.
        """
        sides = self.gather("side")
        given, count = 0, _FIRST_BLOCK
        is_left = np.ones(len(self), bool)
        while given < len(self):
            last = min(count, len(self)) - 1
            limit = np.partition(sides, last)[last]
            block = np.flatnonzero(is_left & (sides <= limit))
            yield from block[np.argsort(sides[block], kind="stable")].tolist()
            is_left[block] = False
            given, count = given + len(block), count * _GROWTH

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
        if self.span is not None:
            digest.update(repr(self.span).encode())
        return digest.hexdigest()

    @functools.cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts.

        Raises:
          UserError: a document of the split that cannot be read.
        """
        self._require_readable()
        if self.span is not None:
            return (self.span.stop - self.span.start) * len(self)
        return int(self.gather("size").sum())

    def _require_readable(self) -> None:
        for document in np.flatnonzero(self.gather("size") < 0).tolist():
            self[document]

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """[readers + 1], the number of each reader's first record, and the number of records."""
        return np.cumsum([0, *map(len, self.readers)])

    def _find(self, document: int) -> tuple[Any, int]:
        number = int(self.members[document])
        reader = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.readers[reader], number - int(self._starts[reader])

    def gather(self, name: str) -> np.ndarray:
        """[documents], an attribute of their readers, see `files`."""
        return _joined(self.readers, name)[self.members]


class Sources:
    """The sources of a run: `train[name]` and `eval[name]` are the splits, each a `Source`.

    A source is opened once, when it is first asked for: those of a run that only generates need not
    exist. As no split of a run trains on what another one holds out, any `train` opens all.

    With `eval_path` the eval split is all of `eval_path`; without it, the share `eval_fraction` of
    the documents of `path`, at least one of them, or a tail where it has only one. The train split
    is the rest of `path`, less what other sources hold out.

    Asking for a source raises UserError where nothing matches, there is no text in it, a file is of
    an unknown kind or cannot be read, a single document is too short to hold a part of it out, or
    nothing is left to train on. A bad record raises when it is read.
    """

    def __init__(self, data: DataConfig, store: IndexStore) -> None:
        self.data, self._store = data, store
        self.train = _Split(data.source_names, self._open_train)
        self.eval = _Split(data.source_names, self._eval)
        self._readers_of: dict[str, tuple[Any, ...]] = {}
        self._opened: dict[tuple[str, str], Source] = {}

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

        `excluded_documents` would be trained on if no source held them out. The same documents
        under the same relative names give the same fingerprint on any machine.

        Raises:
          UserError: as opening; or a bad record.
        """
        result = {}
        for name in self.data.source_names:
            train, held_out = self._left(name), self.eval[name]
            both = f"{train.fingerprint}\n{held_out.fingerprint}"
            result[name] = {
                "fingerprint": hashlib.sha256(both.encode()).hexdigest(),
                "documents": len(train),
                "bytes": train.num_bytes,
                "eval_documents": len(held_out),
                "eval_bytes": held_out.num_bytes,
                "excluded_documents": len(self._own(name)) - len(train),
            }
        return result

    def trained(self) -> list[Source]:
        """Returns the train splits in which something is left; an evaluated source may have none.

        Raises:
          UserError: as opening; or there is none.
        """
        splits = [self._left(name) for name in self.data.source_names]
        return [split for split in splits if len(split)] or [*self.train.values()]

    def _open_train(self, name: str) -> Source:
        train = self._left(name)
        if not len(train):
            path = self._config(name).path
            raise UserError(
                f"data.sources.{name}.path = {path!r}: nothing is left to train on: all of it is "
                "held out, by an eval_path or by another source"
            )
        return train

    def _left(self, name: str) -> Source:
        """What a source may train on once all that the run holds out is taken from it."""
        return self._once("left", name, self._take_held_out)

    def _own(self, name: str) -> Source:
        """What a source might train on if it were the only one of the run."""
        return self._once("own", name, self._choose_own)

    def _eval(self, name: str) -> Source:
        return self._once("eval", name, self._choose_eval)

    def _once(self, kind: str, name: str, make: Callable[[str], Source]) -> Source:
        if (kind, name) not in self._opened:
            self._opened[kind, name] = make(name)
        return self._opened[kind, name]

    def _choose_own(self, name: str) -> Source:
        is_apart = self._config(name).eval_path
        return self._documents(name, "path") if is_apart else self._divided(name)[0]

    def _choose_eval(self, name: str) -> Source:
        is_apart = self._config(name).eval_path
        return self._documents(name, "eval_path") if is_apart else self._divided(name)[1]

    def _take_held_out(self, name: str) -> Source:
        own = self._own(name)
        if own.span is None:
            is_left = ~self._held_out.has(own.gather("key"))
        else:
            size = f"{self._eval(name).num_bytes:,}"
            logger.info("data.sources.%s: one text; its last %s bytes are held out", name, size)
            is_left = np.array([not self._held_out.has_text(*_whole_and_part(own))])
        left = dataclasses.replace(own, members=own.members[is_left])
        if excluded := len(own) - len(left):
            logger.info(
                "data.sources.%s: %s of %s documents are not trained on, because an eval_path or "
                "another source of this run holds them out",
                *(name, f"{excluded:,}", f"{len(own):,}"),
            )
        return left

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        """What all sources of the run hold out."""
        whole, part = [], []
        for name in self.data.source_names:
            source = self._eval(name)
            if source.span is None:
                whole.append(source.gather("key"))
            else:
                whole.append(np.array([key_of(source[0]["text"].encode("utf-8"))]))
                part.append(source.gather("key")[0])
        return HeldOut.of(whole, part)

    def _divided(self, name: str) -> tuple[Source, Source]:
        """The train and the eval split of a source without an `eval_path`."""
        whole = self._documents(name, "path")
        keys, eval_fraction = whole.gather("key"), self.data.eval_fraction
        only = only_content(keys)
        if only is None:
            is_eval = choose(whole.gather("side"), keys, eval_fraction)
            train = dataclasses.replace(whole, members=whole.members[~is_eval])
            return train, dataclasses.replace(whole, members=whole.members[is_eval])
        document = dataclasses.replace(whole, members=whole.members[only : only + 1])
        text = document[0]["text"].encode("utf-8")
        start = tail_start(text, eval_fraction)
        if not start:
            raise UserError(
                f"data.sources.{name}.path: {shown_name(document.origin(0))} is all its text, and "
                f"too short to hold a part of it out; set data.sources.{name}.eval_path"
            )
        train = dataclasses.replace(document, span=slice(0, start))
        return train, dataclasses.replace(document, span=slice(start, len(text)))

    def _documents(self, name: str, kind: str) -> Source:
        """All documents of the `path` or `eval_path` of a source."""
        field, pattern = f"data.sources.{name}.{kind}", getattr(self._config(name), kind)
        if pattern not in self._readers_of:
            with phase(f"reading the text of {pattern}"):
                found = _readers(field, pattern, self.data.text_field, self._store)
            self._readers_of[pattern] = found
        readers = self._readers_of[pattern]
        source = Source(name, readers, np.flatnonzero(_joined(readers, "has_text")))
        if not (source.gather("key") != BLANK).any():
            raise UserError(f"{field} = {pattern!r}: has no text in it")
        return source

    def _config(self, name: str) -> SourceConfig:
        return next(source for source in self.data.sources if source.name == name)


class _Split(Mapping[str, Source]):
    """One split of every source by name, opened when asked for."""

    def __init__(self, names: Sequence[str], opened: Callable[[str], Source]) -> None:
        self._names, self._opened = names, opened

    def __getitem__(self, name: str) -> Source:
        if name not in self._names:
            raise KeyError(name)
        return self._opened(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _whole_and_part(source: Source) -> tuple[bytes, bytes]:
    """The text of a source that is one document, and the part of it in this split."""
    text = dataclasses.replace(source, span=None)[0]["text"].encode("utf-8")
    return text, text[source.span or slice(None)]


def _joined(readers: Sequence[Any], name: str) -> np.ndarray:
    return np.concatenate([getattr(reader, name) for reader in readers])


def _readers(field: str, pattern: str, text_field: str, store: IndexStore) -> tuple[Any, ...]:
    if pattern.startswith("stdlib:"):
        kinds = {"stdlib:code": stdlib.code, "stdlib:docs": stdlib.docs}
        require(pattern in kinds, field, pattern, suggest(pattern, [*kinds]))
        return (kinds[pattern](sysconfig.get_path("stdlib"), store),)
    if pattern.startswith(recall.PREFIX):
        return (recall.Documents(recall.Task.parse(field, pattern), store),)
    found = paths.find(field, pattern)
    if found.left_out:
        logger.info(
            "%s: %s; %s files of other kinds are left out",
            *(field, paths.in_words(found.files), f"{found.left_out:,}"),
        )
    readers: list[Any] = []
    for is_text, group in itertools.groupby(found.files, paths.is_text):
        files = [*group]
        if is_text:
            key = f"{os.path.abspath(os.path.expanduser(pattern))} from {files[0].name}"
            readers.append(open_texts(found.root, files, store, key))
        else:
            for file in files:
                kind = paths.RECORD_FILES[paths.kind(file)]
                readers.append(kind(Path(file.path), file.name, text_field, store))
    return tuple(readers)
