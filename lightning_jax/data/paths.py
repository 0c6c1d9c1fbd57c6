"""What the path of a source means: the files it names, each of a kind that we read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.data.files import ArrayRecordFile, GzipLinesFile, JsonLinesFile, ParquetFile
from lightning_jax.data.globs import FoundFile, glob_files, shown_name

TEXT_SUFFIXES = (".txt", ".md", ".py")
RECORD_FILES: dict[str, Any] = {
    ".jsonl": JsonLinesFile,
    ".jsonl.gz": GzipLinesFile,
    ".parquet": ParquetFile,
    ".array_record": ArrayRecordFile,
}
KINDS = (*TEXT_SUFFIXES, *RECORD_FILES)


class Found(NamedTuple):
    """The files of a path, in order of their names, which are relative to `root`.

    `left_out` counts the files of a folder that are of no known kind.
    """

    root: Path
    files: tuple[FoundFile, ...]
    left_out: int


def find(field: str, path: str) -> Found:
    """Returns the files that a source reads.

    Args:
      field: the config field of the path, for errors.
      path: a file or a glob (see `globs`), all of whose files must be of a known kind; or a folder,
        which stands for all files below it that are.

    Raises:
      UserError: there are none, one is of no known kind, or a folder cannot be listed.
    """
    expanded = os.path.expanduser(path)
    is_folder = os.path.isdir(expanded)
    root, files = glob_files(os.path.join(expanded, "**") if is_folder else expanded)
    known = [file for file in files if kind(file)]
    if is_folder:
        right = f"a folder with files of a known kind: {', '.join(KINDS)}"
        require(bool(known), field, path, right)
        return Found(root, tuple(known), len(files) - len(known))
    require(bool(files), field, path, "a path or a glob that matches a file")
    for file in files:
        if not kind(file):
            name = shown_name(file.path)
            raise UserError(f"{field}: {name} is of no known kind: {', '.join(KINDS)}")
    return Found(root, tuple(files), 0)


def kind(file: FoundFile) -> str:
    """Returns the suffix that says how a file is read; "" if that is not known."""
    suffix = os.path.splitext(file.path)[1]
    if suffix in TEXT_SUFFIXES:
        return suffix
    return next((suffix for suffix in RECORD_FILES if file.name.endswith(suffix)), "")


def is_text(file: FoundFile) -> bool:
    """Whether a file is one document."""
    return kind(file) in TEXT_SUFFIXES


def in_words(files: Iterable[FoundFile]) -> str:
    """Returns how many files there are of each kind: `12 .txt, 1 .jsonl`."""
    counts = Counter(map(kind, files))
    return ", ".join(f"{counts[suffix]:,} {suffix}" for suffix in KINDS if counts[suffix])
