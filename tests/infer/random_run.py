"""Runs with random weights that were never trained, in memory and in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from lightning_jax import model as lm
from lightning_jax.checkpoint import Checkpointer, LoadedRun
from lightning_jax.config import CheckpointMeta, RunConfig
from lightning_jax.config.fields import to_dict
from lightning_jax.data.tokenizer import ByteTokenizer
from lightning_jax.infer.run import Run
from lightning_jax.runtime.files import write_json
from lightning_jax.train.plan import Plan
from tests import tiny


def random_run(**changes: Any) -> Run:
    """`tiny.tiny_run` with `changes`, bytes as tokens and parameters of deviation 0.3."""
    config = tiny.tiny_run("unread", model__vocab_size=272, **changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32),
        lm.abstract_params(config.model),
    )
    position: Any = dict(step=3, tokens=0, stage="stable", seq_len=32, rope_base_global=100.0)
    loaded = LoadedRun(CheckpointMeta(config, **position), params, lm.init_router(config.model))
    return Run(loaded, ByteTokenizer())


def save_run(workdir: Path, config: RunConfig) -> int:
    """Writes the folder of a run after its last step, which is returned; the text is not read."""
    meta = Plan.of(config).meta(Plan.of(config).total_steps)
    params, router = lm.init_params(config.model, jax.random.key(0)), lm.init_router(config.model)
    with Checkpointer(workdir, keep=1) as checkpointer:
        checkpointer.save(meta.step, {"params": params, "router": router}, None, to_dict(meta))
    write_json(workdir / "config.json", to_dict(config))
    return meta.step
