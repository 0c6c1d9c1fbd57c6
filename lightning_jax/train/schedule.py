"""Learning rate and stage of every optimizer step, on a clock of tokens.

Convention: what happens at step s depends on the tokens consumed *before* it, `tokens_at(stages,
s)`, padding included. Each stage lasts whole steps, so it may consume up to one step more than its
`tokens`; the next stage's clock starts there. The rate is a function of tokens alone: batch size
and sequence length only choose at which points of it the steps lie.

Warm-up is linear in tokens, from the rate at which the previous stage ended. Decay runs over the
last `decay_tokens` of a stage (WSD, arXiv 2404.06395; the `sqrt` form 1 - sqrt(x) is from arXiv
2405.18392).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lightning_jax.config import StageConfig


def stage_at(stages: Sequence[StageConfig], step: int) -> tuple[int, int]:
    """Returns the index of the stage that runs step `step` and the step within that stage.

    From the end of the run on: the last stage, and a step at or past its own number of steps.
    """
    for index, stage in enumerate(stages[:-1]):
        if step < stage.steps:
            return index, step
        step -= stage.steps
    return len(stages) - 1, step


def tokens_at(stages: Sequence[StageConfig], step: int) -> int:
    """Returns the number of tokens consumed before step `step`, exactly."""
    index, rest = stage_at(stages, step)
    before = sum(stage.steps * stage.step_tokens for stage in stages[:index])
    return before + rest * stages[index].step_tokens


def learning_rate(stages: Sequence[StageConfig], step: int | jax.Array) -> jax.Array:
    """Returns the learning rate of step `step`, counted from the start of the first stage.

    Args:
      stages: all stages of the run.
      step: a Python integer or an int32 array of any shape; may be traced. Steps, not tokens,
        because tokens pass the largest int32.

    Returns:
      float32 of the shape of `step`. Past the end of the run: the last stage's final rate.
    """
    step = jnp.asarray(step, jnp.int32)
    rate = jnp.zeros(step.shape, jnp.float32)
    start, previous = 0, 0.0
    for stage in stages:
        rate = jnp.where(step >= start, _rate_in_stage(stage, step - start, previous), rate)
        start, previous = start + stage.steps, _end_rate(stage)
    return rate


def _decays(stage: StageConfig) -> bool:
    return stage.decay != "none" and stage.decay_tokens > 0


def _end_rate(stage: StageConfig) -> float:
    return stage.final_learning_rate if _decays(stage) else stage.learning_rate


def _rate_in_stage(stage: StageConfig, step: jax.Array, previous: float) -> jax.Array:
    rate = jnp.full(step.shape, stage.learning_rate, jnp.float32)
    if stage.warmup_tokens:
        done = _fraction(stage, step, 0, stage.warmup_tokens)
        warm = previous + (stage.learning_rate - previous) * done
        rate = jnp.where(done < 1, warm, rate)
    if _decays(stage):
        done = _fraction(stage, step, stage.tokens - stage.decay_tokens, stage.decay_tokens)
        left = {
            "linear": lambda x: 1 - x,
            "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
            "sqrt": lambda x: 1 - jnp.sqrt(x),
        }[stage.decay](done)
        final = stage.final_learning_rate
        rate = jnp.where(done > 0, final + (stage.learning_rate - final) * left, rate)
    return rate


def _fraction(stage: StageConfig, step: jax.Array, begin: int, length: int) -> jax.Array:
    """Share of `length` tokens from token `begin` of the stage on that lies before `step`."""
    # Subtracting in whole steps keeps the difference exact where tokens exceed float32's 24 bits.
    near = begin // stage.step_tokens
    offset = near * stage.step_tokens - begin
    tokens = (step - near).astype(jnp.float32) * stage.step_tokens + offset
    return jnp.clip(tokens / length, 0, 1)
