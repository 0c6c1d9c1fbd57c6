"""The plan of a run: the stage and batch shape of each step, the tokens before it, and its knobs.

Everything that counts steps or tokens asks the plan. Step s is preceded by s steps, and depends on
the tokens consumed *before* it, padding included. Each stage lasts whole steps, so it may consume
up to one step more than its `tokens`; the next stage's clock starts there.

The learning rate is a function of tokens alone: batch size and sequence length only choose the
points of that function at which the steps lie. Warm-up is linear in tokens, from the rate at which
the previous stage ended. Decay runs over the last `decay_tokens` of a stage (WSD, arXiv 2404.06395;
the `sqrt` form 1 - sqrt(x) is from arXiv 2405.18392). Everything is computed on the host, with
integers of any size and float64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from lightning_jax.config import CheckpointMeta, RunConfig, StageConfig

# By decay: the share of the way from the final rate to the peak that remains.
_REMAINING = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "sqrt": lambda done: 1 - math.sqrt(done),
}


class Knobs(NamedTuple):
    """Values that may change from step to step without a compilation, a pytree of float32 scalars.

    `balance_weights` holds the weights of the losses that the run uses, named as in
    `ops.balance.balance_losses`; the others are not computed.
    """

    learning_rate: Any
    rope_base_global: Any
    balance_weights: dict[str, Any]
    z_loss_weight: Any


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive steps of one stage with batches of one shape.

    Attributes:
      stage: the stage that the steps belong to.
      first_step: steps of the run before this segment.
      steps: steps of this segment.
      first_token: tokens of the run before this segment.
      batch_size: sequences per step, over all devices.
      seq_len: tokens per sequence.
      accumulate: micro-batches per step.
      rope_base_global: RoPE base of global layers.
    """

    stage: StageConfig
    first_step: int
    steps: int
    first_token: int
    batch_size: int
    seq_len: int
    accumulate: int
    rope_base_global: float

    @property
    def end_step(self) -> int:
        """Steps of the run up to the end of this segment."""
        return self.first_step + self.steps

    @property
    def step_tokens(self) -> int:
        """Tokens that one step consumes, padding included."""
        return self.batch_size * self.seq_len

    @property
    def micro_batch(self) -> int:
        """Sequences that are in memory together, over all devices."""
        return self.batch_size // self.accumulate


@dataclasses.dataclass(frozen=True)
class Plan:
    """All segments of a run, in order. The segments of one stage follow one another."""

    config: RunConfig
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, config: RunConfig) -> Plan:
        """Makes the plan of a run: one segment per stage, the fewest steps that fill its tokens."""
        segments: list[Segment] = []
        step = token = 0
        for stage in config.stages:
            base = stage.rope_base_global or config.model.attention.rope_base_global
            segment = Segment(
                stage=stage,
                first_step=step,
                steps=-(-stage.tokens // (stage.batch_size * stage.seq_len)),
                first_token=token,
                batch_size=stage.batch_size,
                seq_len=stage.seq_len,
                accumulate=stage.accumulate,
                rope_base_global=base,
            )
            segments.append(segment)
            step, token = segment.end_step, token + segment.steps * segment.step_tokens
        return cls(config, tuple(segments))

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.segments[-1].end_step

    @property
    def total_tokens(self) -> int:
        """Tokens that the whole run consumes, padding included."""
        return self.tokens_at(self.total_steps)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """Steps of the run up to the end of each stage."""
        return tuple({s.stage.name: s.end_step for s in self.segments}.values())

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(segment.seq_len for segment in self.segments)

    def segment_at(self, step: int) -> Segment:
        """Returns the segment of step `step`; from the end of the run on, the last segment."""
        return next((s for s in self.segments if step < s.end_step), self.segments[-1])

    def last_trained(self, steps: int) -> Segment:
        """Returns the segment of the last of `steps` steps; the first segment before any step."""
        return self.segment_at(max(steps - 1, 0))

    def tokens_at(self, step: int) -> int:
        """Returns the number of tokens consumed before step `step`, exactly."""
        segment = self.segment_at(step)
        return segment.first_token + (step - segment.first_step) * segment.step_tokens

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of step `step`; past the end of the run, its final rate."""
        stage = self.segment_at(step).stage
        begin = next(s.first_token for s in self.segments if s.stage == stage)
        index = self.config.stages.index(stage)
        previous = end_rate(self.config.stages[index - 1]) if index else 0.0
        return _rate_in_stage(stage, self.tokens_at(step) - begin, previous)

    def knobs(self, step: int) -> Knobs:
        """Returns the knobs of step `step`."""
        moe, segment = self.config.model.moe, self.segment_at(step)
        weights = moe.balance_weights if moe.num_experts else {}
        return Knobs(
            learning_rate=np.float32(self.learning_rate(step)),
            rope_base_global=np.float32(segment.rope_base_global),
            balance_weights={name: np.float32(w) for name, w in weights.items() if w},
            z_loss_weight=np.float32(self.config.optimizer.z_loss_weight),
        )

    def meta(self, steps: int) -> CheckpointMeta:
        """Returns the description of the checkpoint after `steps` steps."""
        segment = self.last_trained(steps)
        # Imported weights have had no step: their RoPE base is the model's, not the first stage's.
        untrained = self.config.model.attention.rope_base_global
        return CheckpointMeta(
            config=self.config,
            step=steps,
            tokens=self.tokens_at(steps),
            stage=segment.stage.name,
            seq_len=segment.seq_len,
            rope_base_global=segment.rope_base_global if steps else untrained,
        )


def _decays(stage: StageConfig) -> bool:
    return stage.decay != "none" and stage.decay_tokens > 0


def end_rate(stage: StageConfig) -> float:
    """Returns the learning rate at the end of a stage."""
    return stage.final_learning_rate if _decays(stage) else stage.learning_rate


def _rate_in_stage(stage: StageConfig, tokens: int, previous: float) -> float:
    """The rate after `tokens` tokens of a stage; `previous` is the last stage's final rate."""
    peak, final = stage.learning_rate, stage.final_learning_rate
    if tokens < stage.warmup_tokens:
        return previous + (peak - previous) * (tokens / stage.warmup_tokens)
    decayed = tokens - (stage.tokens - stage.decay_tokens)
    if not _decays(stage) or decayed <= 0:
        return peak
    return final + (peak - final) * _REMAINING[stage.decay](min(decayed / stage.decay_tokens, 1.0))
