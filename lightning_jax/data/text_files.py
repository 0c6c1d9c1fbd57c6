"""Documents that have a name of their own, not a number: text files, and texts made of files.

The cache folder holds one table per glob with size, time, key and digest of its text files: a later
start asks the system for size and time of each file, and reads only those that changed.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lightning_jax.config.errors import UserError
from lightning_jax.data.files import LONGEST, decoded, unchanged
from lightning_jax.data.globs import FoundFile, encoded_name, shown_name
from lightning_jax.data.index import (
    BLANK,
    UNREADABLE,
    IndexStore,
    kept_name,
    key_of,
    keys_of,
)
from lightning_jax.runtime import phases

_DIGEST_BYTES = 32


class _Named:
    """Named documents; memory holds some tens of bytes per document. Attributes: see `files`.

    With `by_name` their names decide what is held out, not their content.
    """

    def __init__(
        self,
        names: Iterable[str],
        size: np.ndarray,
        key: np.ndarray,
        digests: np.ndarray,
        *,
        by_name: bool,
    ) -> None:
        encoded = [encoded_name(name) for name in names]
        self._names, self._name_ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])
        self.size, self.key, self.side = size, key, key
        if by_name:
            self.side = keys_of(b"".join(_sha256(name)[:8] for name in encoded))
        self.has_text = (size != 0) & (key != BLANK)
        content = hashlib.sha256(b"\0".join(encoded))
        content.update(np.ascontiguousarray(digests))
        self.digest = content.digest()

    def __len__(self) -> int:
        return len(self.size)

    def label(self, record: int) -> str:
        start, end = self._name_ends[record : record + 2]
        return self._names[start:end].decode("utf-8", "surrogateescape")


class TextFiles(_Named):
    """Files of `root`, each one document, in the order given."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        size: np.ndarray,
        key: np.ndarray,
        digests: np.ndarray,
        *,
        by_name: bool,
    ) -> None:
        super().__init__(names, size, key, digests, by_name=by_name)
        self.root = root

    def read(self, record: int) -> str:
        path = self.root / self.label(record)
        place = shown_name(str(path))
        try:
            content = _content(path)
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({error.strerror})") from error
        if self.size[record] < 0:
            _text(content, place)  # raises what was found
        return unchanged(content, place, self.key[record], _text)


class HeldTexts(_Named):
    """Texts in memory that were made of files: they have the names and keys of those."""

    def __init__(self, files: TextFiles, ends: np.ndarray, texts: np.ndarray) -> None:
        """`texts` (uint8) are all texts, `ends` (int64 [documents + 1]) 0 and where each ends."""
        self._ends, self._texts = ends, texts
        digests = b"".join(_sha256(self._bytes(i)) for i in range(len(files)))
        names = (files.label(i) for i in range(len(files)))
        digests = np.frombuffer(digests, np.uint8)
        super().__init__(names, np.diff(ends), files.key, digests, by_name=True)

    def read(self, record: int) -> str:
        return self._bytes(record).decode("utf-8")

    def _bytes(self, record: int) -> bytes:
        start, end = self._ends[record : record + 2]
        return self._texts[start:end].tobytes()


def open_texts(
    root: Path,
    files: Sequence[FoundFile],
    store: IndexStore,
    key: str,
    *,
    readable: bool = False,
    by_name: bool = False,
) -> TextFiles:
    """Opens text files of `root`; those whose size and time are in the store are not read.

    `key`, such as the glob that found them, names their table in the store. `readable` leaves out
    files that are not UTF-8 or cannot be read; `by_name`: see `TextFiles`.
    """
    table, count = kept_name("texts", key), 0
    known, old, old_digests = {}, store.load(table), np.empty((0, _DIGEST_BYTES), np.uint8)
    if old is not None:
        each = (old[name].tolist() for name in ("bytes", "time", "size"))
        rows = enumerate(zip(old["names"].tobytes().split(b"\0"), *each, strict=True))
        # One that could not be read is tried again: its size and time do not tell why.
        known = {file[:3]: row for row, file in rows if file[3] >= 0}
        old_digests = old["digest"].reshape(-1, _DIGEST_BYTES)
    names = [encoded_name(file.name) for file in files]
    size, keys = np.empty(len(files), np.int64), np.empty(len(files), np.uint64)
    digests = np.empty((len(files), _DIGEST_BYTES), np.uint8)
    for i, file in enumerate(files):
        row = known.get((names[i], file.size, file.time))
        if old is not None and row is not None:
            size[i], keys[i], digests[i] = old["size"][row], old["key"][row], old_digests[row]
            continue
        size[i], keys[i], digests[i] = _read(file.path)
        count += 1
        phases.detail(f"file {i + 1} of {len(files)}, once")
    if count:
        arrays = {
            "bytes": np.array([file.size for file in files], np.int64),
            "time": np.array([file.time for file in files], np.int64),
            "size": size,
            "key": keys,
            "digest": digests.ravel(),
            "names": np.frombuffer(b"\0".join(names), np.uint8),
        }
        store.keep(table, arrays)
    chosen = np.flatnonzero((size >= 0) | (not readable))
    found = [files[i].name for i in chosen.tolist()]
    return TextFiles(root, found, size[chosen], keys[chosen], digests[chosen], by_name=by_name)


def _read(path: str) -> tuple[int, np.uint64, np.ndarray]:
    """Size, key and digest of a text file; -1 and zeros if it is not readable text."""
    try:
        text = _text(_content(Path(path)), path)
    except (OSError, UserError):
        return -1, UNREADABLE, np.zeros(_DIGEST_BYTES, np.uint8)
    return len(text), key_of(text), np.frombuffer(_sha256(text), np.uint8)


def _content(path: Path) -> bytes:
    """The bytes of a file that is not too large for one document."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > LONGEST:
            place = shown_name(str(path))
            raise UserError(f"{place}: longer than {LONGEST:,} bytes; make several files of it")
        return file.read()


def _text(content: bytes, place: str) -> bytes:
    """The UTF-8 text in a file without its byte order mark."""
    decoded(content, place)
    return content.removeprefix(codecs.BOM_UTF8)


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
