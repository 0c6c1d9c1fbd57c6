"""A run's folder that begins with weights from elsewhere: checkpoint 0, and where it came from."""

from __future__ import annotations

import os
from typing import Any

from lightning_jax import model as lm
from lightning_jax.checkpoint import Checkpointer
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.data.tokenizer import resolve_tokenizer
from lightning_jax.train import workdir as folder


def write_start(
    workdir: str | os.PathLike[str],
    config: RunConfig,
    params: Any,
    router: lm.Router,
    *,
    origin: dict[str, Any],
) -> None:
    """Makes a folder that evaluates and generates as it is, and whose training begins there.

    Args:
      workdir: a folder without checkpoints.
      config: the run; `experiments.train` with the same model and tokenizer goes on from here.
      params, router: the weights, float32 as every run keeps them.
      origin: what `run.json` says of where they came from.

    Raises:
      UserError: the folder has checkpoints or cannot be written, or the tokenizer has more ids
        than the model.
    """
    path = folder.prepare(workdir)
    tokenizer = resolve_tokenizer(config.data, path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer = {config.data.tokenizer!r}: has {tokenizer.vocab_size} ids, the "
            f"model {config.model.vocab_size}"
        )
    stage = config.stages[0]
    meta = {
        "step": 0,
        "stage": stage.name,
        "tokens": 0,
        "rope_base_global": stage.rope_base_global or config.model.attention.rope_base_global,
        "seq_len": stage.seq_len,
        "config": to_dict(config),
    }
    with Checkpointer(path, keep=config.keep_checkpoints) as checkpointer:
        if checkpointer.latest_step() is not None:
            raise UserError(
                f"workdir = {str(path)!r}: has checkpoints already; give the weights another one"
            )
        items = dict(zip(folder.START_ITEMS, (params, router), strict=True))
        checkpointer.save(0, items, None, meta)
    folder.record(path, config, {"origin": origin})
