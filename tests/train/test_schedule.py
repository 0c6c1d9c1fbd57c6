"""The learning rate is a function of tokens: exact at its corners, blind to batch size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.config import StageConfig
from lightning_jax.train.schedule import learning_rate, stage_at, tokens_at

BASE = StageConfig(
    name="a",
    tokens=1_000,
    mixture=(("code", 1.0),),
    batch_size=2,
    seq_len=5,
    accumulate=1,
    learning_rate=0.5,
    final_learning_rate=0.0,
    warmup_tokens=200,
    decay="none",
    decay_tokens=0,
    rope_base_global=0.0,
)
DECAY = dataclasses.replace(
    BASE, name="b", warmup_tokens=0, decay="linear", decay_tokens=1_000, final_learning_rate=0.125
)
TAIL = dataclasses.replace(BASE, name="c", tokens=400, learning_rate=0.25, warmup_tokens=100)
STAGES = (BASE, DECAY, TAIL)


def oracle(stages, tokens):
    """The rate after `tokens` tokens, in float64, for stages of whole steps."""
    previous = 0.0
    for stage in stages:
        length = stage.steps * stage.step_tokens
        decays = stage.decay != "none" and stage.decay_tokens > 0
        if tokens < length or stage is stages[-1]:
            if tokens < stage.warmup_tokens:
                share = tokens / stage.warmup_tokens
                return previous + (stage.learning_rate - previous) * share
            done = (tokens - stage.tokens + stage.decay_tokens) / max(stage.decay_tokens, 1)
            if not decays or done <= 0:
                return stage.learning_rate
            done = min(done, 1)
            left = {
                "linear": 1 - done,
                "cosine": math.cos(math.pi * done) / 2 + 0.5,
                "sqrt": 1 - math.sqrt(done),
            }[stage.decay]
            final = stage.final_learning_rate
            return final + (stage.learning_rate - final) * left
        tokens -= length
        previous = stage.final_learning_rate if decays else stage.learning_rate
    raise AssertionError


def rates(stages):
    total = sum(stage.steps for stage in stages)
    return np.asarray(jax.jit(lambda steps: learning_rate(stages, steps))(jnp.arange(total + 5)))


@pytest.mark.parametrize("decay", ["linear", "cosine", "sqrt", "none"])
def test_matches_the_oracle_at_every_step(decay):
    stages = (BASE, dataclasses.replace(DECAY, decay=decay), TAIL)
    actual = rates(stages)
    expected = [oracle(stages, tokens_at(stages, step)) for step in range(len(actual))]
    np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=1e-7)


def test_corners_are_exact():
    assert learning_rate(STAGES, 0) == 0
    assert learning_rate(STAGES, 20) == 0.5  # warm-up of 200 tokens at 10 a step
    assert learning_rate(STAGES, 99) == learning_rate(STAGES, 100) == 0.5
    assert learning_rate(STAGES, 200) == 0.125  # the next warm-up starts where the decay ended
    assert learning_rate(STAGES, 210) == 0.25
    last = (BASE, DECAY)
    assert learning_rate(last, 200) == learning_rate(last, 10_000) == 0.125


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 5), (4, 5), (1, 25)])
def test_batch_does_not_move_the_curve(batch_size, seq_len):
    """A change of batch between stages: same rate at the same token, same integral."""
    other = tuple(
        dataclasses.replace(stage, batch_size=batch_size * (1 + index), seq_len=seq_len)
        for index, stage in enumerate(STAGES[:2])
    )
    at = {tokens_at(STAGES[:2], step): rate for step, rate in enumerate(rates(STAGES[:2]))}
    total = 0.0
    for step, rate in enumerate(rates(other)[: sum(stage.steps for stage in other)]):
        tokens, end = tokens_at(other, step), tokens_at(other, step + 1)
        if tokens in at:
            np.testing.assert_allclose(rate, at[tokens], rtol=1e-6)
        total += rate * (end - tokens)
    # Warm-up 200 * 0.25, stable 800 * 0.5, decay 1000 * 0.3125; the sum is a left Riemann sum.
    assert abs(total - 762.5) < other[1].step_tokens / 2
    assert tokens_at(other, sum(stage.steps for stage in other)) == 2_000


def test_whole_steps_round_a_stage_up_and_hold_the_final_rate():
    stage = dataclasses.replace(DECAY, tokens=95, decay_tokens=50, batch_size=2)
    stages = (stage, TAIL)
    assert stage.steps == 10
    assert tokens_at(stages, 10) == 100
    np.testing.assert_allclose(learning_rate(stages, 9), 0.125 + 0.375 * 5 / 50, rtol=1e-6)
    assert learning_rate(stages, 10) == 0.125


def test_trillions_of_tokens_keep_every_step_apart():
    stage = dataclasses.replace(
        DECAY,
        tokens=10**13,
        batch_size=1_024,
        seq_len=4_096,
        decay_tokens=10**9,
        warmup_tokens=10**9,
    )
    steps = np.asarray([0, 1, 238, 239, *range(stage.steps - 240, stage.steps + 1)])
    expected = [oracle((stage,), tokens_at((stage,), int(step))) for step in steps]
    actual = learning_rate((stage,), jnp.asarray(steps))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert tokens_at((stage,), stage.steps) == stage.steps * 1_024 * 4_096
    assert actual[-1] == 0.125


def test_stage_at_walks_the_stages():
    assert [stage_at(STAGES, step) for step in (0, 99, 100, 199, 200, 239)] == [
        (0, 0),
        (0, 99),
        (1, 0),
        (1, 99),
        (2, 0),
        (2, 39),
    ]
    assert stage_at(STAGES, 240) == (2, 40)
    assert tokens_at(STAGES, 240) == 2_400
