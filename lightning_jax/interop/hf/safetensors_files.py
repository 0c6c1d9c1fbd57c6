"""Folders of safetensors files: one file, or several with an index, read and written by tensor."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lightning_jax.config.errors import UserError
from lightning_jax.data.files import optional_import
from lightning_jax.runtime.files import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Reader:
    """Tensors of a folder by name; each is read when it is asked for.

    Raises:
      UserError: no safetensors in the folder, a missing or damaged file, a tensor in two files, or
        an index that names a tensor which its file does not have.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        with contextlib.ExitStack() as opened:
            self._where = self._locate(opened)
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
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of its file."""
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        return self._files[self._where[name]].get_tensor(name)

    def _locate(self, opened: contextlib.ExitStack) -> dict[str, str]:
        index = self._folder / INDEX
        if not index.exists():
            if not (self._folder / SINGLE).exists():
                raise UserError(f"{self._folder}: has neither {SINGLE} nor {INDEX}")
            return dict.fromkeys(self._open(SINGLE, opened), SINGLE)
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: not an index of safetensors files ({error})") from error
        where: dict[str, str] = {}
        for file in sorted(set(listed.values())):
            for name in self._open(file, opened):
                if name in where:
                    raise UserError(f"{self._folder}: {name} is in {where[name]} and in {file}")
                where[name] = file
        for name, file in listed.items():
            if where.get(name) != file:
                raise UserError(f"{self._folder / file}: lacks {name}, which {INDEX} says it has")
        return where

    def _open(self, file: str, opened: contextlib.ExitStack) -> list[str]:
        path = self._folder / file
        safetensors = optional_import("safetensors", extra="interop")
        if not path.is_file():
            raise UserError(f"{path}: no such file, though {INDEX} names it")
        try:
            self._files[file] = opened.enter_context(safetensors.safe_open(str(path), "numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error})") from error
        return list(self._files[file].keys())


def write_folder(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int
) -> None:
    """Writes tensors to `model.safetensors`, or to numbered files of at most `max_shard_bytes`.

    Files get their names when all are written, so a folder never holds half a model; host memory
    holds the tensors of one file. A single tensor may be larger than `max_shard_bytes`.
    """
    safetensors = optional_import("safetensors.numpy", extra="interop")
    shards: list[tuple[Path, list[str]]] = []
    total = 0
    try:
        for shard in _shards(tensors, max_shard_bytes):
            path = folder / f".{SINGLE}.{len(shards)}.tmp"
            shards.append((path, list(shard)))
            safetensors.save_file(shard, str(path), metadata={"format": "pt"})
            total += sum(value.nbytes for value in shard.values())
        _publish(folder, shards, total)
    finally:
        for path, _ in shards:
            path.unlink(missing_ok=True)


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


def _publish(folder: Path, shards: list[tuple[Path, list[str]]], total: int) -> None:
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    where = {}
    for (path, tensors), name in zip(shards, names, strict=True):
        os.replace(path, folder / name)
        where |= dict.fromkeys(tensors, name)
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        if old.name not in names:
            old.unlink()
