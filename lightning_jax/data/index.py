"""The index of a file of records: everything needed of the file without reading it again.

One pass over a file makes its index: where each record begins, how long its text is, its key (the
hash of its content, which decides whether it is held out, see `held_out`) and a digest of
everything. The pass keeps 24 bytes per record in memory. The index is kept in a cache folder and
memory-mapped from there, so that later starts read nothing but the index, and several processes
share its pages.

Indexes lie in the user's cache folder and not beside the run, because a corpus outlives its runs:
every run of a sweep, and every evaluation of a run, opens the same files. They are found by path,
size and time of change; a file that changes gets a new index. What a reader finds later must still
have its key, so a file that changes while it is in use is noticed.

Documents are read in random order, which suits no compressed file: one document of a gzip file or
of a parquet row group costs the decompression of the text around it. So the texts of such a file
are unpacked once into one plain file beside its index, as Hugging Face datasets does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lightning_jax.config.errors import UserError
from lightning_jax.data import cache
from lightning_jax.data.globs import shown_name
from lightning_jax.runtime import phases
from lightning_jax.runtime.files import replacing

logger = logging.getLogger(__name__)

# A record: its number counted from 1, where its bytes end, and its UTF-8 text or its error.
Entry = tuple[int, int, bytes | UserError]

_FORMAT = 2  # another number rebuilds all indexes
_REPORT_RECORDS = 256
# Unpacking looks at the free space once per so many bytes, and stops where less would be left.
_DISK_RESERVE = 2**28


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """The records of one file.

    Attributes:
      ends: int64 [records + 1], 0 and then the end of each record in bytes. A record, with the
        blank lines before it, begins where the one before it ends.
      size: int64 [records], UTF-8 bytes of its text; -1 where reading it raises.
      key: uint64 [records], see `key_of`; `UNREADABLE` where reading it raises.
      skipped: int64 [blank lines], how many records come before each blank line.
      digest: uint8 [32], sha256 of number, size and text of every record.
    """

    ends: np.ndarray
    size: np.ndarray
    key: np.ndarray
    skipped: np.ndarray
    digest: np.ndarray

    def __len__(self) -> int:
        return len(self.size)

    def number(self, record: int) -> int:
        """The number of a record counted from 1, blank lines included, as an editor counts."""
        return int(record) + 1 + int(np.searchsorted(self.skipped, record, side="right"))


def content_of(text: bytes) -> bytes:
    """Returns what makes a text the same as another: it without outer white space and "\\r\\n"."""
    text = text.strip()
    return text.replace(b"\r\n", b"\n") if b"\r" in text else text


def keys_of(hashes: bytes | bytearray) -> np.ndarray:
    """Returns uint64 [n] of n times 8 bytes, the beginnings of sha256 hashes."""
    return np.frombuffer(hashes, ">u8").astype(np.uint64)


def key_of(text: bytes) -> np.uint64:
    """Returns the key of a text: the first 8 bytes of the sha256 of its content."""
    return keys_of(hashlib.sha256(content_of(text)).digest()[:8])[0]


BLANK = key_of(b"")
UNREADABLE = np.uint64(2**64 - 1)  # the largest key, which is not held out if any other can be


def build(entries: Iterable[Entry]) -> Index:
    """Makes the index of a file."""
    ends, size, skipped, hashes = array("q", [0]), array("q"), array("q"), bytearray()
    digest, previous = hashlib.sha256(), 0
    for number, end, text in entries:
        skipped.extend([len(size)] * (number - previous - 1))
        previous = number
        ends.append(end)
        if isinstance(text, UserError):
            size.append(-1)
            hashes += b"\xff" * 8
            continue
        content = content_of(text)
        content_hash = hashlib.sha256(content).digest()
        size.append(len(text))
        hashes += content_hash[:8]
        digest.update(b"%d %d\n" % (number, len(text)))
        digest.update(content_hash)
        if len(content) != len(text):
            digest.update(text)
    return Index(
        ends=np.frombuffer(ends, np.int64),
        size=np.frombuffer(size, np.int64),
        key=keys_of(hashes),
        skipped=np.frombuffer(skipped, np.int64),
        digest=np.frombuffer(digest.digest(), np.uint8),
    )


class IndexStore:
    """Gives the indexes of files: those kept in its folder, or new ones, which it keeps there.

    `folder` is None if nothing can be kept. Files that cannot be read raise UserError; a folder
    that cannot be used costs time and, for compressed files, temporary disk space.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def records(self, path: Path, text_field: str, entries: Callable[[], Iterable[Entry]]) -> Index:
        """Returns the index of a file that is read where it is; `entries` reads it."""
        name = self._name(path, text_field)
        index = self._load(name)
        if index is not None:
            return index
        return self._keep(name, build(self._watched(entries(), path)))

    def unpacked(
        self, path: Path, text_field: str, entries: Callable[[], Iterable[Entry]]
    ) -> tuple[Index, Path]:
        """Returns the index of a compressed file, and the plain file of its texts.

        A bad record has its error in place of its text.

        Raises:
          UserError: no disk has room for the texts.
        """
        name = self._name(path, text_field)
        if self.folder is not None:
            texts, index = self.folder / f"{name}.text", self._load(name)
            with contextlib.suppress(OSError):
                if index is not None and texts.stat().st_size == index.ends[-1]:
                    return index, texts
            try:
                return self._keep(name, self._unpack(path, entries(), texts)), texts
            except OSError as error:
                logger.warning("%s: %s; unpacking to a temporary file", texts, error.strerror)
        texts = Path(_temporary_folder().name) / f"{name}.text"
        try:
            return self._unpack(path, entries(), texts), texts
        except OSError as error:
            raise UserError(
                f"{shown_name(str(path))}: its text cannot be unpacked to {texts.parent} "
                f"({error.strerror}); set XDG_CACHE_HOME to a folder with more room"
            ) from error

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """Returns arrays that `keep` wrote; None if they are missing or damaged."""
        return None if self.folder is None else cache.load_arrays(self.folder / f"{name}.index")

    def keep(self, name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Keeps arrays in the folder and returns them memory-mapped; as they are if that fails."""
        if self.folder is None or not cache.save_arrays(self.folder / f"{name}.index", arrays):
            return arrays
        return self.load(name) or arrays

    def _name(self, path: Path, text_field: str) -> str:
        try:
            status = path.stat()
        except OSError as error:
            name = shown_name(str(path))
            raise UserError(f"{name}: cannot be read ({error.strerror})") from error
        key = (str(path.resolve()), status.st_size, status.st_mtime_ns, text_field)
        return kept_name("records", *key)

    def _load(self, name: str) -> Index | None:
        arrays = self.load(name)
        return None if arrays is None else Index(**arrays)

    def _keep(self, name: str, index: Index) -> Index:
        arrays = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
        return Index(**self.keep(name, arrays))

    def _unpack(self, path: Path, entries: Iterable[Entry], texts: Path) -> Index:
        texts.parent.mkdir(parents=True, exist_ok=True)
        with replacing(texts) as file:
            logger.info("unpacking the text of %s to %s, once", shown_name(str(path)), texts)
            return build(_written(self._watched(entries, path), file))

    def _watched(self, entries: Iterable[Entry], path: Path) -> Iterator[Entry]:
        done, total, name = 0, path.stat().st_size / 1e9, shown_name(str(path))
        for count, entry in enumerate(entries):
            text = entry[-1]
            done += len(text) if isinstance(text, bytes) else 0
            if count % _REPORT_RECORDS == 0:
                phases.detail(f"{name} ({total:.1f} GB), once: {done / 1e9:.1f} GB of text")
            yield entry


def kept_name(kind: str, *key: object) -> str:
    """Returns the name under which a store keeps the arrays of `key`."""
    content = "\0".join(map(str, (_FORMAT, *key)))
    return f"{kind}_{hashlib.sha256(os.fsencode(content)).hexdigest()[:32]}"


def _written(entries: Iterable[Entry], file: BinaryIO) -> Iterator[Entry]:
    end = checked = 0
    for number, _, text in entries:
        end += file.write(text if isinstance(text, bytes) else str(text).encode())
        if end - checked > _DISK_RESERVE:
            checked = end
            if shutil.disk_usage(os.path.dirname(file.name)).free < _DISK_RESERVE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield number, end, text


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that lives as long as this process."""
    return tempfile.TemporaryDirectory(prefix="lightning_jax_")
