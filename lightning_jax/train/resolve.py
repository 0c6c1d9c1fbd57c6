"""Fills in what a config leaves to the tokenizer, before anything else is done with a run."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lightning_jax.config import RunConfig
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import Tokenizer, resolve_tokenizer
from lightning_jax.runtime.files import disk_errors, write_file

_VOCAB_MULTIPLE = 16
# What `resolve_tokenizer` keeps in the folder of a run: one of these.
_KEPT = ("tokenizer.json", "tokenizer.model", "tokenizer")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A run with its vocabulary's size, and its tokenizer, of which nothing is written yet.

    Attributes:
      files: content of the tokenizer's files, by name relative to the run's folder; empty where it
        has none.
    """

    config: RunConfig
    tokenizer: Tokenizer
    files: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        """sha256 (hex) of the tokenizer's files."""
        return digest(self.files)

    def keep(self, workdir: Path) -> None:
        """Writes the tokenizer's files, so that the folder is complete. UserError: disk."""
        if kept_files(workdir) == self.files:
            return
        with disk_errors(f"cannot write the tokenizer to {workdir}"):
            for name in _KEPT:
                remove = shutil.rmtree if (workdir / name).is_dir() else Path.unlink
                if (workdir / name).exists():
                    remove(workdir / name)
            with tempfile.TemporaryDirectory(dir=workdir, prefix=".tokenizer.") as made:
                for name, content in self.files.items():
                    path = Path(made) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_file(path, content)
                for path in Path(made).iterdir():
                    os.replace(path, workdir / path.name)


def kept_files(workdir: Path) -> dict[str, bytes]:
    """Returns the files of the tokenizer that a run's folder keeps, by relative name."""
    kept = [path for name in _KEPT for path in (workdir / name, *(workdir / name).rglob("*"))]
    return {
        path.relative_to(workdir).as_posix(): path.read_bytes()
        for path in sorted(kept)
        if path.is_file()
    }


def digest(files: Mapping[str, bytes]) -> str:
    """Returns the sha256 (hex) of names and contents."""
    result = hashlib.sha256()
    for name in sorted(files):
        result.update(f"{name} {len(files[name])}\n".encode())
        result.update(files[name])
    return result.hexdigest()


def resolve(
    config: RunConfig, workdir: str | Path | None = None, sources: Sources | None = None
) -> Resolved:
    """Resolves what depends on the tokenizer; writes nothing.

    `model.vocab_size = 0` becomes the tokenizer's number of ids, rounded up to a multiple of 16.
    Resolving the result again changes nothing.

    Args:
      config: the run.
      workdir: folder of a run that has begun, with the tokenizer that it keeps; None resolves the
        tokenizer afresh.
      sources: those of `config.data`, if they are open already; they are read only if the
        tokenizer is still to be trained.

    Raises:
      UserError: a vocabulary smaller than the tokenizer's, or as `resolve_tokenizer`.
    """
    sources, rows = sources or Sources.open(config.data), config.model.vocab_size
    with tempfile.TemporaryDirectory(prefix="lightning_jax_") as temporary:
        kept = workdir if workdir is not None and kept_files(Path(workdir)) else None
        folder = Path(kept or temporary)
        tokenizer = resolve_tokenizer(sources, folder, rows=rows)
        files = kept_files(folder)
    size = rows or -(-tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    model = dataclasses.replace(config.model, vocab_size=size)
    return Resolved(dataclasses.replace(config, model=model), tokenizer, files)
