"""Small configs and data that the tests share."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import base
from lightning_jax import sharding
from lightning_jax.config import MeshConfig, ModelConfig, RunConfig, StageConfig
from lightning_jax.config.fields import build
from lightning_jax.data.batch import Batch

WORDS = [
    "def",
    "return",
    "lambda",
    "class",
    "import",
    "yield",
    "pass",
    "raise",
    "while",
    "break",
    "assert",
]


def write_corpus(folder: Path, documents: int = 60) -> str:
    """Writes a jsonl of short made-up documents; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    path = folder / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(documents):
            words = generator.choice(WORDS, size=generator.integers(5, 60))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return str(path)


def tiny_config(**changes: Any) -> Any:
    """The base ConfigDict shrunk to compile in seconds; `changes` are dotted paths with `__`."""
    config = base.get_config()
    config.model.model_dim = 32
    config.model.unit = "LG"
    config.model.mlp_dim = 48
    config.model.head_chunk = 64
    config.model.attention.num_heads = 4
    config.model.attention.head_dim = 8
    config.model.attention.window = 8
    config.model.moe.num_experts = 8
    config.model.moe.expert_dim = 16
    config.model.moe.max_experts = 4
    config.model.moe.top_k = 2
    config.model.moe.target_experts = 2.0
    config.model.moe.num_groups = 2
    config.log_every = 1
    config.eval_every = 0
    config.eval_tokens = 512
    config.sample_tokens = 0
    config.histogram_every = 0
    with config.unlocked():
        for name, value in changes.items():
            node, *path = [config, *name.split("__")]
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
    return config


def tiny_stage(**changes: Any) -> StageConfig:
    """A stage of constant rate 1 and 1,000 tokens, over the source `a` alone."""
    fields = dict(
        name="s",
        tokens=1000,
        mixture=(("a", 1.0),),
        batch_size=2,
        seq_len=16,
        accumulate=1,
        learning_rate=1.0,
        final_learning_rate=0.0,
        warmup_tokens=0,
        decay="none",
        decay_tokens=0,
        rope_base_global=0.0,
    )
    return StageConfig(**{**fields, **changes})


def tiny_run(corpus: str, **changes: Any) -> RunConfig:
    """A run of two stages of a few steps over two mixed sources of `corpus`."""
    config = tiny_config(**{"checkpoint_every": 3, **changes})
    config.data.sources = base.named(a=base.source(corpus), b=base.source(corpus))
    sizes = dict(batch_size=4, seq_len=32)
    config.stages = base.named(
        stable=base.stage(
            tokens=4 * 32 * 6, mixture=base.named(a=0.75, b=0.25), warmup_tokens=256, **sizes
        ),
        decay=base.stage(
            tokens=4 * 32 * 4,
            mixture=base.named(a=0.5, b=0.5),
            decay="sqrt",
            decay_tokens=256,
            accumulate=2,
            rope_base_global=50_000.0,
            **sizes,
        ),
    )
    return build(RunConfig, config)


def tiny_model(vocab_size: int = 64, **changes: Any) -> ModelConfig:
    """A ModelConfig alone; `changes` are as for `tiny_config` but inside `model`."""
    inside = {f"model__{name}": value for name, value in changes.items()}
    config = build(RunConfig, tiny_config(**inside)).model
    return dataclasses.replace(config, vocab_size=vocab_size)


def mesh_config(**sizes: int) -> MeshConfig:
    """The sizes of some mesh axes; the others are 1."""
    return MeshConfig(**{**dict.fromkeys(sharding.MESH_AXES, 1), **sizes})


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first devices; axes that are not named have one."""
    return sharding.make_mesh(mesh_config(**sizes), jax.devices()[: math.prod(sizes.values())])


def random_batch(batch: int, time: int, vocab_size: int, seed: int = 0) -> Batch:
    """A packed batch with several documents per row and some padding at the end of each."""
    generator = np.random.default_rng(seed)
    segments, positions = np.zeros((2, batch, time), np.int32)
    for row in range(batch):
        start, segment = 0, 1
        while start < time - time // 8:
            length = min(int(generator.integers(3, time)), time - time // 8 - start)
            segments[row, start : start + length] = segment
            positions[row, start : start + length] = np.arange(length)
            start, segment = start + length, segment + 1
    tokens = generator.integers(0, vocab_size, (2, batch, time)).astype(np.int32)
    return Batch(*tokens, segments, positions, (segments > 0).astype(np.float32))
