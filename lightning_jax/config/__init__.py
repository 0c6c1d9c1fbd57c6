"""The config of a model and a run: frozen, validated dataclasses, built from nested mappings."""

from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from lightning_jax.config.meta import CheckpointMeta
from lightning_jax.config.model import AttentionConfig, ModelConfig, MoeConfig, RopeScalingConfig
from lightning_jax.config.run import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
)

__all__ = [
    "AttentionConfig",
    "CheckpointMeta",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimizerConfig",
    "RopeScalingConfig",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "UserError",
    "build",
]
