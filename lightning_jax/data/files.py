"""Files of records, one document each, read by number.

Every reader, here and in `text_files`, has `len`, `label(record)` (the document's origin),
`read(record)` (its text), `size` (int64 [records], UTF-8 bytes; -1: reading it raises), `share`
(float64 [records], see `index.shares`), `digest` (of labels and texts) and `has_text` (bool
[records]), and pickles.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import suggest
from lightning_jax.data.index import Entry, Index, IndexStore, encoded_name

_BATCH = 64  # records asked of a library at one time
_BUFFER = 2**20  # bytes of a parquet column read at one time


def optional_import(name: str, extra: str = "data") -> Any:
    """Imports a package of an extra; without it, the one-line error says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"package {name.partition('.')[0]} is missing: pip install lightning_jax[{extra}]"
        ) from error


class _RecordFile:
    """An indexed file; `origin` is its relative name."""

    def __init__(self, path: Path, origin: str, text_field: str, index: Index) -> None:
        self.path, self.origin, self.text_field, self.index = path, origin, text_field, index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size(self) -> np.ndarray:
        return self.index.size

    @property
    def share(self) -> np.ndarray:
        return self.index.share

    @property
    def digest(self) -> bytes:
        content = encoded_name(self.origin) + b"\0" + self.index.digest.tobytes()
        return hashlib.sha256(content).digest()

    @property
    def has_text(self) -> np.ndarray:
        return np.ones(len(self), bool)  # an empty text in a record is deliberate

    def label(self, record: int) -> str:
        return f"{self.origin}:{self.index.number(record)}"

    def _bytes(self, path: Path, record: int) -> bytes:
        start, end = map(int, self.index.ends[record : record + 2])
        try:
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error


class JsonLinesFile(_RecordFile):
    """One record per line; blank lines do not count. Lines are read from the file itself."""

    def __init__(self, path: Path, origin: str, text_field: str, store: IndexStore) -> None:
        index = store.records(path, origin, text_field, lambda: _json_lines(path, text_field, open))
        super().__init__(path, origin, text_field, index)

    def read(self, record: int) -> str:
        place = f"{self.path}, line {self.index.number(record)}"
        return _text_of(self._bytes(self.path, record).strip(), self.text_field, place)


class _UnpackedFile(_RecordFile):
    """A compressed file, whose texts were unpacked to a plain one."""

    _entries: Callable[[Path, str], Iterator[Entry]]

    def __init__(self, path: Path, origin: str, text_field: str, store: IndexStore) -> None:
        index, self._texts = store.unpacked(
            path, origin, text_field, lambda: self._entries(path, text_field)
        )
        super().__init__(path, origin, text_field, index)

    def read(self, record: int) -> str:
        text = self._bytes(self._texts, record).decode("utf-8")
        if self.index.size[record] < 0:
            raise UserError(text)
        return text


class GzipLinesFile(_UnpackedFile):
    """A gzip file of JSON lines."""

    @staticmethod
    def _entries(path: Path, text_field: str) -> Iterator[Entry]:
        return _json_lines(path, text_field, gzip.open)


class ParquetFile(_UnpackedFile):
    """One record per row; only the text column is read."""

    @staticmethod
    def _entries(path: Path, text_field: str) -> Iterator[Entry]:
        parquet, arrow = optional_import("pyarrow.parquet"), optional_import("pyarrow")
        try:
            # A row group may be as large as the file, so it is read and decoded in pieces.
            with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
                names = file.schema_arrow.names
                if text_field not in names:
                    raise UserError(
                        f"data.text_field = {text_field!r}: no such column in {path}: "
                        f"{suggest(text_field, names)}"
                    )
                batches = file.iter_batches(_BATCH, columns=[text_field], use_threads=False)
                texts = (text for batch in batches for text in batch.column(0).to_pylist())
                for number, text in enumerate(texts, 1):
                    place = f"{path}, row {number}"
                    yield number, 0, _or_error(_encoded, text, text_field, place)
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable parquet file ({error})") from error


class ArrayRecordFile(_RecordFile):
    """One document per record: JSON objects if the first record is one, else UTF-8 text."""

    def __init__(self, path: Path, origin: str, text_field: str, store: IndexStore) -> None:
        module = optional_import("array_record.python.array_record_data_source")
        try:
            self._records = module.ArrayRecordDataSource([str(path)])
            self._is_json = bool(len(self._records)) and _is_object(self._records[0])
            index = store.records(path, origin, text_field, lambda: self._entries(path, text_field))
        except Exception as error:  # The library raises RuntimeErrors and ValueErrors of all kinds.
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a readable array_record file ({reason})") from error
        super().__init__(path, origin, text_field, index)

    def read(self, record: int) -> str:
        place = f"{self.path}, record {record + 1}"
        if self._is_json:
            return _text_of(self._records[int(record)], self.text_field, place)
        return decoded(self._records[int(record)], place)

    def _entries(self, path: Path, text_field: str) -> Iterator[Entry]:
        for first in range(0, len(self._records), _BATCH):
            records = range(first, min(first + _BATCH, len(self._records)))
            for number, content in enumerate(self._records.__getitems__(records), first + 1):
                place = f"{path}, record {number}"
                if self._is_json:
                    text = _or_error(_encoded_field, content, text_field, place)
                else:
                    text = _or_error(_encoded_text, content, place)
                yield number, 0, text


def _json_lines(path: Path, text_field: str, opened: Callable[..., BinaryIO]) -> Iterator[Entry]:
    end, prefix = 0, f"{path}, line "
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                end += len(line)
                line = line.strip()
                if line:
                    place = prefix + str(number)
                    yield number, end, _or_error(_encoded_field, line, text_field, place)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a complete gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


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
    return content


def _text_of(content: bytes, text_field: str, place: str) -> str:
    """Returns the text in a JSON record, once it is known to be one."""
    text = _field_of(content, text_field, place)
    _encoded(text, text_field, place)
    return text


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
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: data.text_field = {text_field!r} has an unpaired surrogate"
        ) from error
