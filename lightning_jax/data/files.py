"""Files of records, one document each, read by number.

Every reader, here and in `text_files`, has `len`, `label(record)` (the document's origin),
`read(record)` (its text), `size` (int64 [records], UTF-8 bytes; -1: reading it raises), `key`
(uint64 [records], of its content, see `index.key_of`), `side` (uint64 [records], the key that
decides whether it is held out), `digest` (of labels and texts) and `has_text` (bool [records]), and
pickles. Reading raises UserError, which names file and record, where the file is gone or cannot be
read, where the record is bad, and where it is no longer what the index was made of.

What a small file can make of itself has limits: a document has at most `LONGEST` bytes, and a
compressed file at most `_RATIO` times its own size, once that is above `_ALWAYS` bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.config.errors import UserError, suggest
from lightning_jax.data.globs import encoded_name, shown_name
from lightning_jax.data.index import Entry, Index, IndexStore, key_of
from lightning_jax.runtime.invocation import install

LONGEST = 2**30  # bytes of a document, and of a line: it is held in memory several times
_RATIO, _ALWAYS = 100, 2**28
_BATCH, _BATCH_BYTES = 64, 2**24  # records asked of a library at one time: so many, or so large
_BUFFER = 2**20  # bytes of a parquet column read at one time


def optional_import(name: str, extra: str = "data") -> Any:
    """Imports a package of an extra; without it, the one-line error says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"package {package} is missing: {install(extra)}") from error


class _RecordFile:
    """An indexed file; `origin` is its relative name."""

    unit = "line"  # what a record is called

    def __init__(self, path: Path, origin: str, text_field: str, index: Index) -> None:
        self.path, self.origin, self.text_field, self.index = path, origin, text_field, index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size(self) -> np.ndarray:
        return self.index.size

    @property
    def key(self) -> np.ndarray:
        return self.index.key

    @property
    def side(self) -> np.ndarray:
        return self.index.key

    @property
    def digest(self) -> bytes:
        content = encoded_name(self.origin) + b"\0" + self.index.digest.tobytes()
        return hashlib.sha256(content).digest()

    @property
    def has_text(self) -> np.ndarray:
        return np.ones(len(self), bool)  # an empty text in a record is deliberate

    def label(self, record: int) -> str:
        return f"{self.origin}:{self.index.number(record)}"

    def read(self, record: int) -> str:
        place = f"{shown_name(str(self.path))}, {self.unit} {self.index.number(record)}"
        try:
            content = self._content(record)
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({error.strerror or error})") from error
        if self.index.size[record] < 0:
            self._refuse(content, place)
        return unchanged(content, place, self.index.key[record], self._text)

    def _content(self, record: int) -> bytes:
        """The bytes of a record as they are in the file."""
        return self._bytes(self.path, record)

    def _text(self, content: bytes, place: str) -> bytes:
        """The UTF-8 text in the bytes of a record."""
        raise NotImplementedError

    def _refuse(self, content: bytes, place: str) -> None:
        """Raises what the index found wrong with a record."""
        self._text(content, place)

    def _bytes(self, path: Path, record: int) -> bytes:
        start, end = map(int, self.index.ends[record : record + 2])
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


class JsonLinesFile(_RecordFile):
    """One record per line; blank lines do not count. Lines are read from the file itself."""

    def __init__(self, path: Path, origin: str, text_field: str, store: IndexStore) -> None:
        index = store.records(path, text_field, lambda: _json_lines(path, text_field, open))
        super().__init__(path, origin, text_field, index)

    def _text(self, content: bytes, place: str) -> bytes:
        return _encoded_field(content.strip(), self.text_field, place)


class _UnpackedFile(_RecordFile):
    """A compressed file, whose texts were unpacked to a plain one."""

    _entries: Callable[[Path, str], Iterator[Entry]]

    def __init__(self, path: Path, origin: str, text_field: str, store: IndexStore) -> None:
        index, self._texts = store.unpacked(
            path, text_field, lambda: self._entries(path, text_field)
        )
        super().__init__(path, origin, text_field, index)

    def _content(self, record: int) -> bytes:
        return self._bytes(self._texts, record)

    def _text(self, content: bytes, place: str) -> bytes:
        return content

    def _refuse(self, content: bytes, place: str) -> None:
        raise UserError(content.decode("utf-8"))


class GzipLinesFile(_UnpackedFile):
    """A gzip file of JSON lines."""

    @staticmethod
    def _entries(path: Path, text_field: str) -> Iterator[Entry]:
        return _json_lines(path, text_field, gzip.open, _most_text(path))


class ParquetFile(_UnpackedFile):
    """One record per row; only the text column is read."""

    unit = "row"

    @staticmethod
    def _entries(path: Path, text_field: str) -> Iterator[Entry]:
        parquet, arrow = optional_import("pyarrow.parquet"), optional_import("pyarrow")
        try:
            # A row group may be as large as the file, so it is read and decoded in pieces.
            with (
                open(path, "rb") as raw,  # pyarrow takes no path that is not UTF-8
                parquet.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False) as file,
            ):
                names = file.schema_arrow.names
                if text_field not in names:
                    raise UserError(
                        f"data.text_field = {text_field!r}: no such column in {path}: "
                        f"{suggest(text_field, names)}"
                    )
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                rows = min((_at_once(g.total_byte_size, g.num_rows) for g in groups), default=1)
                batches = file.iter_batches(rows, columns=[text_field], use_threads=False)
                texts = (value.as_py() for batch in batches for value in batch.column(0))
                left, prefix = _most_text(path), f"{shown_name(str(path))}, row "
                for number, text in enumerate(texts, 1):
                    place = prefix + str(number)
                    entry = _or_error(_encoded, text, text_field, place)
                    left -= len(entry) if isinstance(entry, bytes) else 0
                    if left < 0:
                        raise _inflates(place)
                    yield number, 0, entry
        except (arrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            name = shown_name(str(path))
            raise UserError(f"{name}: not a readable parquet file ({reason})") from error


class ArrayRecordFile(_RecordFile):
    """One document per record: JSON objects if the first record is one, else UTF-8 text."""

    unit = "record"

    def __init__(self, path: Path, origin: str, text_field: str, store: IndexStore) -> None:
        module = optional_import("array_record.python.array_record_data_source")
        name = shown_name(str(path))
        try:
            self._records = module.ArrayRecordDataSource([str(path)])
            self._is_json = bool(len(self._records)) and _is_object(self._records[0])
            index = store.records(path, text_field, lambda: self._entries(path, text_field))
        except UserError:
            raise
        except Exception as error:  # The library raises RuntimeErrors and ValueErrors of all kinds.
            reason = " ".join(str(error).split())
            raise UserError(f"{name}: not a readable array_record file ({reason})") from error
        super().__init__(path, origin, text_field, index)

    def _content(self, record: int) -> bytes:
        try:
            return self._records[int(record)]
        except Exception as error:
            raise OSError(" ".join(str(error).split())) from error

    def _text(self, content: bytes, place: str) -> bytes:
        if self._is_json:
            return _encoded_field(content, self.text_field, place)
        return _encoded_text(content, place)

    def _entries(self, path: Path, text_field: str) -> Iterator[Entry]:
        prefix = f"{shown_name(str(path))}, record "
        count = _at_once(path.stat().st_size, len(self._records))
        for first in range(0, len(self._records), count):
            records = range(first, min(first + count, len(self._records)))
            for number, content in enumerate(self._records.__getitems__(records), first + 1):
                place = prefix + str(number)
                if self._is_json:
                    text = _or_error(_encoded_field, content, text_field, place)
                else:
                    text = _or_error(_encoded_text, content, place)
                yield number, 0, text


def _json_lines(
    path: Path, text_field: str, opened: Callable[..., Any], most: int = sys.maxsize
) -> Iterator[Entry]:
    """Entries of JSON lines; `most` bytes of them are read, blank lines included."""
    end, number, name = 0, 0, shown_name(str(path))
    prefix = f"{name}, line "
    try:
        with opened(path, "rb") as file:
            while line := file.readline(min(LONGEST, most - end) + 1):
                number, end = number + 1, end + len(line)
                if end > most:
                    raise _inflates(prefix + str(number))
                if len(line) > LONGEST:
                    raise UserError(f"{prefix}{number}: longer than {LONGEST:,} bytes")
                line = line.strip()
                if line:
                    place = prefix + str(number)
                    yield number, end, _or_error(_encoded_field, line, text_field, place)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name}: not a complete gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from error


def _at_once(num_bytes: int, records: int) -> int:
    """How many records of that mean size to ask for at one time."""
    return max(1, min(_BATCH, _BATCH_BYTES * records // max(num_bytes, 1)))


def _most_text(path: Path) -> int:
    """Bytes that a compressed file may inflate to."""
    return max(_ALWAYS, _RATIO * path.stat().st_size)


def _inflates(place: str) -> UserError:
    return UserError(
        f"{place}: up to here the file inflates to more than {_RATIO} times its size; if that is "
        "right, unpack it to a plain .jsonl"
    )


def unchanged(
    content: bytes, place: str, key: np.uint64, text_of: Callable[[bytes, str], bytes]
) -> str:
    """Returns the text in `content` if it still has its key."""
    with contextlib.suppress(UserError):
        text = text_of(content, place)
        if key_of(text) == key:
            return text.decode("utf-8")
    raise UserError(
        f"{place}: is not what it was when the file was indexed; the file was changed without a "
        "change of its time, or while it was in use: restore it, or `touch` it and start again"
    )


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


def _or_error(function: Callable[..., bytes], *arguments: Any) -> bytes | UserError:
    """Returns the result of a call, or its error, to be raised when the record is read."""
    try:
        return function(*arguments)
    except UserError as error:
        return error


def decoded(content: bytes, place: str) -> str:
    """Returns a text; raises UserError where it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}") from error


def _encoded_text(content: bytes, place: str) -> bytes:
    decoded(content, place)
    return _not_too_long(content, place)


def _not_too_long(content: bytes, place: str) -> bytes:
    if len(content) > LONGEST:
        raise UserError(f"{place}: a text of {len(content):,} bytes; at most {LONGEST:,} are read")
    return content


def _encoded_field(content: bytes, text_field: str, place: str) -> bytes:
    return _encoded(_field_of(content, text_field, place), text_field, place)


def _field_of(content: bytes, text_field: str, place: str) -> Any:
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
    return record[text_field]


def _encoded(text: object, text_field: str, place: str) -> bytes:
    if not isinstance(text, str):
        raise UserError(
            f"{place}: data.text_field = {text_field!r} must be a string, not {type(text).__name__}"
        )
    try:
        return _not_too_long(text.encode("utf-8"), place)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: data.text_field = {text_field!r} has an unpaired surrogate"
        ) from error
