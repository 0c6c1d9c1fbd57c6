"""Frozen, validated configuration; nothing below this file sees `ml_collections`.

A config file in `configs/` returns an `ml_collections.ConfigDict`; `fields.build` turns it into the
frozen dataclasses of this file, which check themselves. No field has a default here: every field
stands once, with unit and reason, in `configs/base.py`, and other configs are diffs of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import Count, build, require, require_choice, suggest
from lightning_jax.config.kinds import LARGEST_INDEX, integer
from lightning_jax.config.model import ModelConfig

DECAYS = ("none", "linear", "cosine", "sqrt")
# Nearer to 1 a decay rounds to 1 in float32, and dividing by what is missing to 1 fails.
_LARGEST_DECAY = 0.999999
# `jax.random.key` tells no other seeds apart.
_SEEDS = 2**32
_MOST_PREFETCHED = 1024


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule; learning rates belong to the stages."""

    name: str
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    ema_decay: float
    z_loss_weight: float
    on_nan: str

    def __post_init__(self) -> None:
        at = "optimizer."
        require_choice(at + "name", self.name, ("adamw", "muon"))
        require_choice(at + "on_nan", self.on_nan, ("stop", "skip"))
        for name in ("beta1", "beta2", "ema_decay"):
            value, right = getattr(self, name), f"in [0, {_LARGEST_DECAY}]"
            require(0 <= value <= _LARGEST_DECAY, at + name, value, right)
        for name in ("epsilon", "clip_norm"):
            require(getattr(self, name) > 0, at + name, getattr(self, name), "above 0")
        for name in ("weight_decay", "z_loss_weight"):
            require(getattr(self, name) >= 0, at + name, getattr(self, name), "0 or more")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of pretraining; every length is in tokens, the mixture in shares of tokens.

    A stage without a mixture trains on all sources, each by its own weight: `DataConfig.weights`.

    Within the stage the learning rate warms up linearly over `warmup_tokens` (from the previous
    stage's last rate, 0 before the first), stays, and decays over the last `decay_tokens` to
    `final_learning_rate`.
    """

    name: str
    tokens: Count
    mixture: tuple[tuple[str, float], ...]
    batch_size: int
    seq_len: int
    accumulate: int
    learning_rate: float
    final_learning_rate: float
    warmup_tokens: Count
    decay: str
    decay_tokens: Count
    rope_base_global: float

    def __post_init__(self) -> None:
        at = f"stages.{self.name}."
        for name in ("tokens", "batch_size", "seq_len", "accumulate"):
            require(getattr(self, name) >= 1, at + name, getattr(self, name), "at least 1")
        require(
            self.batch_size % self.accumulate == 0,
            at + "accumulate",
            self.accumulate,
            f"a divisor of batch_size = {self.batch_size}",
        )
        require(
            self.batch_size * self.seq_len <= LARGEST_INDEX,
            at + "batch_size",
            self.batch_size,
            f"such that batch_size * seq_len, the tokens of a step, is at most {LARGEST_INDEX}",
        )
        for source, weight in self.mixture:
            require(weight >= 0, f"{at}mixture.{source}", weight, "0 or more")
        fits = not self.mixture or sum(weight for _, weight in self.mixture) > 0
        require(fits, at + "mixture", dict(self.mixture), "at least one weight above 0")
        require_choice(at + "decay", self.decay, DECAYS)
        require(self.learning_rate >= 0, at + "learning_rate", self.learning_rate, "0 or more")
        require(
            0 <= self.final_learning_rate <= self.learning_rate,
            at + "final_learning_rate",
            self.final_learning_rate,
            f"between 0 and learning_rate = {self.learning_rate}",
        )
        require(
            0 <= self.warmup_tokens <= self.tokens,
            at + "warmup_tokens",
            self.warmup_tokens,
            f"between 0 and tokens = {self.tokens}",
        )
        require(
            0 <= self.decay_tokens <= self.tokens - self.warmup_tokens,
            at + "decay_tokens",
            self.decay_tokens,
            f"0 or more, and at most tokens - warmup_tokens = {self.tokens - self.warmup_tokens}",
        )
        require(
            self.rope_base_global == 0 or self.rope_base_global > 1,
            at + "rope_base_global",
            self.rope_base_global,
            "0 (the model's) or above 1",
        )


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where the text of one domain comes from; see `data.sources` for the forms of `path`.

    `weight` is its share in stages without a mixture; a source of weight 0 is only evaluated there.
    """

    name: str
    path: str
    eval_path: str
    weight: float

    def __post_init__(self) -> None:
        at = f"data.sources.{self.name}."
        require(bool(self.path), at + "path", self.path, "a path or a glob")
        require(self.weight >= 0, at + "weight", self.weight, "0 or more")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Tokenizer, sources and packing, shared by all stages."""

    tokenizer: str
    sources: tuple[SourceConfig, ...]
    text_field: str
    eval_fraction: float
    packing: str
    prefetch: int
    streams: int

    def __post_init__(self) -> None:
        require(bool(self.tokenizer), "data.tokenizer", self.tokenizer, '"bytes" or a path')
        require(bool(self.sources), "data.sources", self.sources, "at least one source")
        require(0 < self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "in (0, 1)")
        require_choice("data.packing", self.packing, ("concat", "first_fit"))
        require(
            0 <= self.prefetch <= _MOST_PREFETCHED,
            "data.prefetch",
            self.prefetch,
            f"between 0 and {_MOST_PREFETCHED} batches",
        )
        require(self.streams >= 1, "data.streams", self.streams, "at least 1")

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    def weights(self, stage: StageConfig) -> dict[str, float]:
        """Returns the weights above 0 with which a stage trains on sources; they need not sum to 1.

        They are those of its mixture or, without one, the sources' own.
        """
        pairs = stage.mixture or tuple((source.name, source.weight) for source in self.sources)
        return {name: weight for name, weight in pairs if weight > 0}

    def shares(self, stage: StageConfig) -> dict[str, float]:
        """Returns the parts of a stage's tokens by source; they sum to 1."""
        weights = self.weights(stage)
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what the others leave."""

    replica: int
    data: int
    fsdp: int
    expert: int
    tensor: int
    sequence: int

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name}", size, "at least 1, or -1 for the rest")
        require(
            list(sizes.values()).count(-1) <= 1, "mesh", sizes, "with -1 on one axis at the most"
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines an experiment."""

    seed: Annotated[int, integer(0, _SEEDS - 1)]
    model: ModelConfig
    optimizer: OptimizerConfig
    stages: tuple[StageConfig, ...]
    data: DataConfig
    mesh: MeshConfig
    log_every: int
    histogram_every: int
    eval_every: int
    eval_tokens: Count
    final_eval_tokens: Count
    checkpoint_every: int
    keep_checkpoints: int
    sample_prompt: str
    sample_tokens: int

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: object) -> RunConfig:
        """The inverse of `fields.to_dict`, for a file that a run wrote; errors name it by `where`.

        Raises:
          UserError: a field is missing, unknown, of the wrong type or out of range.
        """
        try:
            return build(cls, values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def __post_init__(self) -> None:
        require(bool(self.stages), "stages", self.stages, "at least one stage")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("histogram_every", "eval_every", "sample_tokens"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 (never) or more")
        prompt, right = self.sample_prompt, "text, without half of a surrogate pair"
        require(not any("\ud800" <= c <= "\udfff" for c in prompt), "sample_prompt", prompt, right)
        self._check_steps()
        for field, items in (("stages", self.stages), ("data.sources", self.data.sources)):
            names = [item.name for item in items]
            require(len(set(names)) == len(names), field, names, "of distinct names")
        for stage in self.stages:
            require(
                stage.batch_size % self.data.streams == 0,
                "data.streams",
                self.data.streams,
                f"a divisor of stages.{stage.name}.batch_size = {stage.batch_size}",
            )
        self._check_mixtures()

    def require_trainable(self) -> None:
        """Raises a UserError for a model that can be used, but not trained as it is.

        Published models may be such, so this is no check of the config itself.
        """
        moe = self.model.moe
        constant = moe.renormalize_gates and moe.slots(moe.train_routing) == 1 < moe.num_experts
        require(
            not constant,
            "model.moe.renormalize_gates",
            moe.renormalize_gates,
            "False to train with one expert per token: a gate divided by itself is always 1, and "
            "the loss sends the router no gradient",
        )

    def _check_mixtures(self) -> None:
        """Every mixture names sources of the run, and every stage has a source to train on."""
        for stage in self.stages:
            for name, _ in stage.mixture:
                require(
                    name in self.data.source_names,
                    f"stages.{stage.name}.mixture",
                    name,
                    suggest(name, self.data.source_names),
                )
            weights = {source.name: source.weight for source in self.data.sources}
            right = f"above 0 for a source: stages.{stage.name} has no mixture of its own"
            require(bool(self.data.weights(stage)), "data.sources.*.weight", weights, right)

    @property
    def forgotten_sources(self) -> tuple[str, ...]:
        """Sources with a weight that no stage takes or names: they are evaluated only."""
        if not all(stage.mixture for stage in self.stages):
            return ()
        named = {name for stage in self.stages for name, _ in stage.mixture}
        return tuple(s.name for s in self.data.sources if s.weight > 0 and s.name not in named)

    def _check_steps(self) -> None:
        """Devices count steps in int32; tokens are counted on the host."""
        steps = sum(-(-stage.tokens // (stage.batch_size * stage.seq_len)) for stage in self.stages)
        right = f"such that the run has at most {LARGEST_INDEX} steps"
        largest = max(self.stages, key=lambda stage: stage.tokens)
        require(steps <= LARGEST_INDEX, f"stages.{largest.name}.tokens", largest.tokens, right)
