"""Fills in what a config leaves to the tokenizer, before anything else is done with a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import Tokenizer, resolve_tokenizer

_VOCAB_MULTIPLE = 16


def resolve(
    config: RunConfig, workdir: str | Path, sources: Sources | None = None
) -> tuple[RunConfig, Tokenizer]:
    """Returns the run with its vocabulary's size, and its tokenizer, which is kept in `workdir`.

    `model.vocab_size = 0` becomes the tokenizer's number of ids, rounded up to a multiple of 16.
    Resolving the result again changes nothing. `sources` are those of `config.data`, if they are
    open already; they are read only if the tokenizer is still to be trained.

    Raises:
      UserError: a vocabulary smaller than the tokenizer's, or as `resolve_tokenizer`.
    """
    tokenizer = resolve_tokenizer(sources or Sources.open(config.data), workdir)
    needed = tokenizer.vocab_size
    size = config.model.vocab_size or -(-needed // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if size < needed:
        raise UserError(
            f"model.vocab_size = {size}: the tokenizer has {needed} ids (0: take those)"
        )
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model), tokenizer
