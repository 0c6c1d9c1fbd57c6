"""Folders of safetensors files: one file, or several with an index, read and written by tensor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lightning_jax.config.errors import UserError
from lightning_jax.config.kinds import TEXT, check, map_of, shorten
from lightning_jax.data.files import optional_import
from lightning_jax.runtime.files import read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What weights may be stored as; integers and 8 bits need a scale, which lies elsewhere.
_FLOATS = ("F64", "F32", "F16", "BF16")


class Reader:
    """Tensors of a folder by name; each is read when it is asked for.

    Names may be written in several ways: `known_name` maps those of the files to those asked for.

    Raises:
      UserError: no safetensors in the folder, a missing or damaged file, a tensor in two files or
        under two names, or an index that names a file outside of the folder or a tensor which its
        file does not have.
    """

    def __init__(self, folder: Path, known_name: Callable[[str], str] = lambda name: name):
        self._folder = folder
        self._written: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        with contextlib.ExitStack() as opened:
            self._where = self._locate(opened)
            for name in self._where:
                other = self._written.setdefault(known_name(name), name)
                if other != name:
                    raise UserError(f"{folder}: {other} and {name} are names of the same tensor")
            self._stack = opened.pop_all()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._written)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, from the header of its file.

        Raises:
          UserError: its entries are no floats of 16 bits or more.
        """
        written = self._written[name]
        header = self._files[self._where[written]].get_slice(written)
        if header.get_dtype() not in _FLOATS:
            path = self._folder / self._where[written]
            right = f"weights are one of {', '.join(_FLOATS)}; save them dequantized first"
            raise UserError(f"{path}: {written} is {header.get_dtype()}: {right}")
        return tuple(header.get_shape())

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        written = self._written[name]
        return self._files[self._where[written]].get_tensor(written)

    def _locate(self, opened: contextlib.ExitStack) -> dict[str, str]:
        index = self._folder / INDEX
        if not index.exists():
            if not (self._folder / SINGLE).exists():
                raise UserError(f"{self._folder}: has neither {SINGLE} nor {INDEX}")
            return dict.fromkeys(self._open(SINGLE, opened), SINGLE)
        described = read_json(index)
        check(described, {"weight_map": map_of(TEXT)}, index, required=["weight_map"])
        listed = described["weight_map"]
        for name, file in listed.items():
            if not _is_name(file):
                right = "the name of a file in this folder"
                raise UserError(f"{index}: weight_map: {name} = {shorten(file)}: must be {right}")
        where: dict[str, str] = {}
        for file in sorted(set(listed.values())):
            for name in self._open(file, opened):
                if name in where:
                    raise UserError(f"{self._folder}: {name} is in {where[name]} and in {file}")
                where[name] = file
        for name, file in listed.items():
            if where.get(name) != file:
                lacks = f"lacks {shorten(name)}, which {INDEX} says it has"
                raise UserError(f"{self._folder / file}: {lacks}")
        if SINGLE not in listed.values() and (self._folder / SINGLE).exists():
            raise UserError(f"{self._folder}: has {SINGLE}, and {INDEX} of other files; remove one")
        return where

    def _open(self, file: str, opened: contextlib.ExitStack) -> list[str]:
        path = self._folder / file
        safetensors = optional_import("safetensors", extra="interop")
        try:
            if not path.is_file():
                raise UserError(f"{path}: no such file, though {INDEX} names it")
            self._files[file] = opened.enter_context(safetensors.safe_open(str(path), "numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a whole safetensors file ({reason})") from error
        return list(self._files[file].keys())


def _is_name(file: str) -> bool:
    """A link may lead elsewhere, as in a cache of downloaded models, but a path may not."""
    is_part = file not in ("", ".", "..") and not set(file) & set("/\\")
    return is_part and file.isprintable() and len(os.fsencode(file)) <= 255


def write_folder(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int
) -> None:
    """Writes tensors to `model.safetensors`, or to numbered files of at most `max_shard_bytes`.

    The folder is new. Host memory holds the tensors of one file. A single tensor may be larger
    than `max_shard_bytes`.
    """
    safetensors = optional_import("safetensors.numpy", extra="interop")
    shards: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        # How many files there will be is known at the end.
        path = folder / f"{len(shards)}.tmp"
        shards.append((path, list(shard)))
        path.touch()
        mode = path.stat().st_mode
        safetensors.save_file(shard, str(path), metadata={"format": "pt"})
        path.chmod(mode)  # safetensors lets nobody but the owner read
        total += sum(value.nbytes for value in shard.values())
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    where = {}
    for (path, held), name in zip(shards, names if count > 1 else [SINGLE], strict=True):
        os.replace(path, folder / name)
        where |= dict.fromkeys(held, name)
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, value in tensors:
        if shard and size + value.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = value
        size += value.nbytes
    yield shard
