"""What a config leaves to the tokenizer, filled in: the first thing that is done with a run."""

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
    """Returns the run with its vocabulary's size, and its tokenizer, which is left in `workdir`.

    `model.vocab_size = 0` becomes the tokenizer's number of ids, rounded up to a multiple of 16.
    The result may be resolved again and stays as it is. `sources` are those of `config.data`,
    where they are open already; only a tokenizer that is still to be trained reads them.

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
