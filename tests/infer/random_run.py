"""A run with random weights that was never trained."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lightning_jax import model as lm
from lightning_jax.checkpoint import LoadedRun
from lightning_jax.config import CheckpointMeta
from lightning_jax.data.tokenizer import ByteTokenizer
from lightning_jax.infer.run import Run
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
