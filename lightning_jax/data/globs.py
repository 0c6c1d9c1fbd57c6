"""The files that a path or a glob means: each real file once, whatever links lead to it.

`*`, `?` and `[...]` match within one name, `**` any number of folders; none of them matches a name
that begins with a dot. Links to files and folders are followed. `**` enters each real folder once,
so links that lead back, or aside, cost nothing and repeat nothing.

Of several names of one file, the one without a link counts, else the shortest. Names are relative
to the last folder before the first wildcard.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_jax.config.errors import UserError

_FOUND_BY_FSCK = "lost+found"  # at the top of a disk; nobody but root may list it


class FoundFile(NamedTuple):
    """A file: its relative name, its path, its bytes and when it changed (nanoseconds)."""

    name: str
    path: str
    size: int
    time: int


def encoded_name(name: str) -> bytes:
    """Returns a file name as UTF-8; bytes that are not UTF-8 stay as they are."""
    return name.encode("utf-8", "surrogateescape")


def shown_name(name: str) -> str:
    """Returns a file name for messages: line breaks and bytes that are not UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def glob_files(pattern: str) -> tuple[Path, list[FoundFile]]:
    """Returns the folder that names are relative to, and the files in order of their names.

    Raises:
      UserError: a folder that cannot be listed.
    """
    root = Path(pattern).parent
    if os.path.isfile(pattern):
        return root, find_files(root, [os.path.join(root, os.path.basename(pattern))])
    while glob.has_magic(str(root)):
        root = root.parent
    parts = Path(pattern).relative_to(root).parts
    return root, find_files(root, _matches(str(root), parts))


def find_files(root: Path, paths: Iterable[str]) -> list[FoundFile]:
    """Returns the files among `paths`, all `root/...`, each real file once, in order of names.

    Raises:
      UserError: one of them cannot be looked at; a link to nowhere is left out.
    """
    names: dict[tuple[int, ...], list[FoundFile]] = {}
    start = len(os.path.join(root, ""))
    for path in paths:
        status = _status(path)
        if status is not None and stat.S_ISREG(status.st_mode):
            name = path[start:].replace(os.sep, "/")
            found = FoundFile(name, path, status.st_size, status.st_mtime_ns)
            # Size and time besides, for file systems whose inode numbers are not unique.
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            names.setdefault(identity, []).append(found)
    return sorted(_best(root, files) for files in names.values())


def _best(root: Path, files: list[FoundFile]) -> FoundFile:
    if len(files) == 1:
        return files[0]
    real = os.path.realpath(root)

    def rank(file: FoundFile) -> tuple[bool, int, str]:
        has_link = os.path.realpath(file.path) != os.path.join(real, file.name)
        return has_link, len(file.name), file.name

    return min(files, key=rank)


def _matches(folder: str, parts: tuple[str, ...]) -> Iterator[str]:
    """Paths below `folder` that match the parts of a pattern."""
    if not parts:
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        while rest[:1] == ("**",):
            rest = rest[1:]
        for inner in _folders(folder):
            yield from _matches(inner, rest or ("*",))
        return
    if not glob.has_magic(first):
        paths = [os.path.join(folder, first)]
    else:
        matches = re.compile(fnmatch.translate(first)).match
        hidden = first.startswith(".")
        names = (e.name for e in _listed(folder) if hidden or not e.name.startswith("."))
        paths = [os.path.join(folder, name) for name in names if matches(name)]
    for path in paths:
        if not rest:
            yield path
        elif os.path.isdir(path):
            yield from _matches(path, rest)


def _folders(top: str) -> Iterator[str]:
    """`top` and the folders below it, each real one once: by its own name before that of a link."""
    seen, linked = set(), [top]
    while linked:
        stack, links = linked, []
        while stack:
            folder = stack.pop()
            status = _status(folder)
            if status is None or (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            yield folder
            for entry in _listed(folder):
                if entry.name.startswith(".") or entry.name == _FOUND_BY_FSCK:
                    continue
                if _is_folder(entry):
                    (links if entry.is_symlink() else stack).append(entry.path)
        linked = sorted(links, reverse=True)


def _status(path: str) -> os.stat_result | None:
    """Of what a path leads to; None if that is nowhere."""
    try:
        return os.stat(path)
    except ValueError:  # a name that no file can have
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise _unreadable(path, error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _listed(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"{shown_name(path)}: cannot be read ({error.strerror})")
