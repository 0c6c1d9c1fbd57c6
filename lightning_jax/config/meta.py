"""The description that a checkpoint holds beside its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.fields import Count, build, require
from lightning_jax.config.kinds import check, integer, number
from lightning_jax.config.model import ModelConfig
from lightning_jax.config.run import RunConfig

_KINDS = {
    "step": integer(0),
    "seq_len": integer(1),
    "rope_base_global": number(1, above=True),
}


@dataclasses.dataclass(frozen=True)
class CheckpointMeta:
    """The run, and the point of it at which a checkpoint was made.

    Attributes:
      config: the run, its vocabulary resolved.
      step: optimizer steps taken.
      tokens: positions consumed by them, padding included.
      stage: the stage of the last step; the first stage before any step.
      seq_len, rope_base_global: tokens per sequence, and RoPE base of global layers, of that step;
        before any step the base is the model's.
    """

    config: RunConfig
    step: int
    tokens: Count
    stage: str
    seq_len: int
    rope_base_global: float

    def __post_init__(self) -> None:
        check(vars(self), _KINDS, "meta", required=())
        stages = [stage.name for stage in self.config.stages]
        require(self.stage in stages, "meta: stage", self.stage, suggest(self.stage, stages))

    @property
    def model(self) -> ModelConfig:
        """The model that the weights were trained as: stages may change the RoPE base."""
        model = self.config.model
        attention = dataclasses.replace(model.attention, rope_base_global=self.rope_base_global)
        return dataclasses.replace(model, attention=attention)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> CheckpointMeta:
        """The inverse of `fields.to_dict`.

        Raises:
          UserError: a field is missing, unknown, of the wrong type or out of range.
        """
        for field in dataclasses.fields(cls):
            if field.name not in values:
                raise UserError(f"it lacks {field.name} in meta")
        return build(cls, values)
