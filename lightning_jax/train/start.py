"""A run's folder that starts from imported weights: checkpoint 0, and the origin of the weights."""

from __future__ import annotations

import os
from typing import Any

from lightning_jax import model as lm
from lightning_jax.checkpoint import Checkpointer
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.train import workdir as folder
from lightning_jax.train.plan import Plan
from lightning_jax.train.resolve import resolve


def write_start(
    workdir: str | os.PathLike[str],
    config: RunConfig,
    params: Any,
    router: lm.Router,
    *,
    origin: dict[str, Any],
) -> None:
    """Makes a folder that can be evaluated and generate text at once, and from which to train.

    Args:
      workdir: a folder without checkpoints.
      config: the run; `experiments.train` with the same model and tokenizer goes on from here.
      params, router: the weights, float32 as every run keeps them.
      origin: where the weights came from, for `run.json`.

    Raises:
      UserError: the folder has checkpoints or cannot be written, or the tokenizer has more ids
        than the model.
    """
    path = folder.prepare(workdir)
    config, _ = resolve(config, path)
    with Checkpointer(path, keep=config.keep_checkpoints) as checkpointer:
        if checkpointer.latest_step() is not None:
            raise UserError(
                f"workdir = {str(path)!r}: has checkpoints already; give the weights another one"
            )
        items = dict(zip(folder.START_ITEMS, (params, router), strict=True))
        checkpointer.save(0, items, None, to_dict(Plan.of(config).meta(0)))
    folder.record(path, config, {"origin": origin})
