"""Documents that have a name of their own, not a number: text files, and texts made of files.

The cache folder holds one table per glob with the size, time and digest of its text files: a later
start asks the system for size and time of each file, and reads only those that changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_jax.config.errors import UserError
from lightning_jax.data.files import decoded
from lightning_jax.data.index import IndexStore, encoded_name, kept_name, shares

_DIGEST_BYTES = 32


class FoundFile(NamedTuple):
    """A file: its relative name, its path, its bytes and when it changed (nanoseconds)."""

    name: str
    path: str
    size: int
    time: int


class _Named:
    """Named documents; memory holds some tens of bytes per document. Attributes: see `files`."""

    def __init__(self, names: Iterable[str], size: np.ndarray, digests: np.ndarray) -> None:
        encoded = [encoded_name(name) for name in names]
        self._names, self._name_ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])
        self.size, self.share, self.has_text = size, shares(encoded), size != 0
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

    def __init__(self, root: Path, names: Sequence[str], size: np.ndarray, digests: np.ndarray):
        super().__init__(names, size, digests)
        self.root = root

    def read(self, record: int) -> str:
        path = self.root / self.label(record)
        try:
            return decoded(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error


class HeldTexts(_Named):
    """Texts in memory, by the names of the files that they were made of."""

    def __init__(self, names: Sequence[str], ends: np.ndarray, texts: np.ndarray) -> None:
        """`texts` (uint8) are all texts, `ends` (int64 [documents + 1]) 0 and where each ends."""
        self._ends, self._texts = ends, texts
        digests = b"".join(_sha256(self._bytes(i)) for i in range(len(names)))
        super().__init__(names, np.diff(ends), np.frombuffer(digests, np.uint8))

    def read(self, record: int) -> str:
        return self._bytes(record).decode("utf-8")

    def _bytes(self, record: int) -> bytes:
        start, end = self._ends[record : record + 2]
        return self._texts[start:end].tobytes()


def find_files(root: Path, paths: Iterable[str]) -> list[FoundFile]:
    """Returns those of `paths` that are files, by name relative to `root`, in order of names."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):  # a link to nowhere
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                name = Path(path).relative_to(root).as_posix()
                found.append(FoundFile(name, path, status.st_size, status.st_mtime_ns))
    return sorted(found)


def open_texts(
    root: Path, files: Sequence[FoundFile], store: IndexStore, key: str, *, readable: bool = False
) -> TextFiles:
    """Opens text files of `root`; those whose size and time are in the store are not read.

    `key`, such as the glob that found them, names their table in the store. `readable` leaves out
    files that are not UTF-8 or cannot be read.
    """
    table, count = kept_name("texts", key), 0
    known, old = {}, store.load(table)
    if old is not None:
        each = old["names"].tobytes().split(b"\0"), old["size"].tolist(), old["time"].tolist()
        known = {file: row for row, file in enumerate(zip(*each, strict=True))}
        old_digests = old["digest"].reshape(-1, _DIGEST_BYTES)
    names = [encoded_name(file.name) for file in files]
    size, digests = np.empty(len(files), np.int64), np.empty((len(files), _DIGEST_BYTES), np.uint8)
    for i, file in enumerate(files):
        row = known.get((names[i], file.size, file.time))
        if row is not None:
            size[i], digests[i] = file.size, old_digests[row]
            continue
        size[i], digests[i] = _read(file.path)
        count += 1
        store.report("reading the text files of %s, once: %d of %d", root, i + 1, len(files))
    if count:
        arrays = {
            "size": size,
            "time": np.array([file.time for file in files], np.int64),
            "digest": digests.ravel(),
            "names": np.frombuffer(b"\0".join(names), np.uint8),
        }
        store.keep(table, arrays)
    chosen = np.flatnonzero((size >= 0) | (not readable))
    return TextFiles(root, [files[i].name for i in chosen], size[chosen], digests[chosen])


def _read(path: str) -> tuple[int, np.ndarray]:
    """Size and digest of a text file; -1 and zeros if it is not readable text."""
    try:
        content = Path(path).read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return -1, np.zeros(_DIGEST_BYTES, np.uint8)
    return len(content), np.frombuffer(_sha256(content), np.uint8)


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
