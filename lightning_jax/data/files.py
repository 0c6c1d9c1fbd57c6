"""Text files as sequences of documents: one a file, or one a record.

Every class here has `len`, `label(record)` (its origin) and `read(record)` (its text), and pickles.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from array import array
from pathlib import Path
from typing import Any

from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import suggest


def optional_import(name: str, extra: str = "data") -> Any:
    """Imports a package of an extra, or says in one line how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"package {name.partition('.')[0]} is missing: pip install lightning_jax[{extra}]"
        ) from error


class _File:
    """A file of records that are read by number; `origin` is its relative name."""

    is_blank = False

    def __init__(self, path: Path, origin: str, text_field: str = "") -> None:
        self.path, self.origin, self.text_field = path, origin, text_field

    def label(self, record: int) -> str:
        return f"{self.origin}:{record + 1}"


class TextFile(_File):
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


class JsonLinesFile(_File):
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


class ParquetFile(_File):
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


class ArrayRecordFile(_File):
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
    if not is_unicode(text):
        raise UserError(f"{place}: data.text_field = {text_field!r} has an unpaired surrogate")
    return text


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: it has no unpaired surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
