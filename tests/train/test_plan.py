"""Segments tile the run; the rate is a function of tokens, exact at its corners; knobs by step."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import accounting
from lightning_jax import model as lm
from lightning_jax.config import CheckpointMeta, RunConfig
from lightning_jax.config.fields import build, to_dict
from lightning_jax.runtime.files import plain
from lightning_jax.train.optimizer import make_optimizer
from lightning_jax.train.plan import Plan, Segment
from lightning_jax.train.progress import Throughput
from lightning_jax.train.step import init_state, train_step
from tests.tiny import random_batch, tiny_config, tiny_stage

BASE = tiny_stage(
    name="a",
    mixture=(("code", 1.0),),
    seq_len=5,
    learning_rate=0.5,
    warmup_tokens=200,
)
DECAY = dataclasses.replace(
    BASE, name="b", warmup_tokens=0, decay="linear", decay_tokens=1_000, final_learning_rate=0.125
)
TAIL = dataclasses.replace(BASE, name="c", tokens=400, learning_rate=0.25, warmup_tokens=100)
STAGES = (BASE, DECAY, TAIL)
RUN = build(RunConfig, tiny_config(model__vocab_size=64))


def plan(stages, **changes):
    return Plan.of(dataclasses.replace(RUN, stages=tuple(stages), **changes))


def learning_rate(stages, step):
    return plan(stages).learning_rate(step)


def tokens_at(stages, step):
    return plan(stages).tokens_at(step)


def oracle(stages, tokens):
    """The rate after `tokens` tokens, in float64, for stages of whole steps."""
    previous = 0.0
    for stage in stages:
        step_tokens = stage.batch_size * stage.seq_len
        length = math.ceil(stage.tokens / step_tokens) * step_tokens
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
    made = plan(stages)
    return np.asarray([made.learning_rate(step) for step in range(made.total_steps + 5)])


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
    steps = plan(other).total_steps
    for step, rate in enumerate(rates(other)[:steps]):
        tokens, end = tokens_at(other, step), tokens_at(other, step + 1)
        if tokens in at:
            np.testing.assert_allclose(rate, at[tokens], rtol=1e-6)
        total += rate * (end - tokens)
    # Warm-up 200 * 0.25, stable 800 * 0.5, decay 1000 * 0.3125; the sum is a left Riemann sum.
    assert abs(total - 762.5) < plan(other).segments[1].step_tokens / 2
    assert tokens_at(other, steps) == plan(other).total_tokens == 2_000


def test_whole_steps_round_a_stage_up_and_hold_the_final_rate():
    stage = dataclasses.replace(DECAY, tokens=95, decay_tokens=50, batch_size=2)
    stages = (stage, TAIL)
    assert plan(stages).segments[0].steps == 10
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
    total = plan((stage,)).total_steps
    steps = [0, 1, 238, 239, *range(total - 240, total + 1)]
    expected = [oracle((stage,), tokens_at((stage,), step)) for step in steps]
    actual = [learning_rate((stage,), step) for step in steps]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert tokens_at((stage,), total) == total * 1_024 * 4_096
    assert actual[-1] == 0.125
    assert len(set(np.float32(actual[-240:]))) == 240


def test_segment_at_walks_the_stages():
    def stage_at(step):
        segment = plan(STAGES).segment_at(step)
        return STAGES.index(segment.stage), step - segment.first_step

    assert [stage_at(step) for step in (0, 99, 100, 199, 200, 239)] == [
        (0, 0),
        (0, 99),
        (1, 0),
        (1, 99),
        (2, 0),
        (2, 39),
    ]
    assert stage_at(240) == (2, 40)
    assert tokens_at(STAGES, 240) == 2_400


def test_stages_of_twenty_billion_tokens_are_exact_at_their_seams():
    """Tokens pass int32 in the first stage, and float32's whole numbers after four steps."""
    shape = dict(tokens=20 * 10**9, batch_size=1_000, seq_len=4_000)
    stages = (
        dataclasses.replace(BASE, warmup_tokens=2 * 10**9, **shape),
        dataclasses.replace(DECAY, decay_tokens=20 * 10**9, **shape),
        dataclasses.replace(TAIL, warmup_tokens=10**9, **shape),
    )
    made = plan(stages)
    assert [(s.first_step, s.steps, s.first_token) for s in made.segments] == [
        (5_000 * index, 5_000, index * 20 * 10**9) for index in range(3)
    ]
    assert made.total_steps == 15_000 and made.total_tokens == 60 * 10**9
    for step in (1, 499, 500, 501, 4_999, 5_000, 5_001, 9_999, 10_000, 10_001, 10_249, 14_999):
        assert made.tokens_at(step) == step * 4_000_000
        assert made.learning_rate(step) == pytest.approx(oracle(stages, step * 4_000_000))
    assert made.learning_rate(10_000) == 0.125 and made.learning_rate(10_250) == 0.25


def test_segments_tile_the_run_in_whole_steps():
    stage = dataclasses.replace(
        BASE, tokens=8 * 512 * 3 + 1, warmup_tokens=0, batch_size=8, seq_len=512, accumulate=4
    )
    made = plan((stage, dataclasses.replace(stage, name="b", rope_base_global=5e4, seq_len=1024)))
    first, second = made.segments
    assert (first.steps, first.step_tokens, first.micro_batch, first.end_step) == (4, 4096, 2, 4)
    assert (second.first_step, second.steps, second.first_token) == (4, 2, 4 * 4096)
    assert (first.rope_base_global, second.rope_base_global) == (1e4, 5e4)
    assert made.total_steps == 6 and made.total_tokens == 4 * 4096 + 2 * 8192
    assert made.stage_ends == (4, 6) and made.max_seq_len == 1024
    # Before a step and after it: a checkpoint belongs to the stage whose step was the last.
    assert made.segment_at(4) is second and made.last_trained(4) is first
    assert made.segment_at(99) is made.last_trained(99) is second
    assert made.last_trained(0) is first


def test_a_stage_in_several_segments_has_one_clock():
    """A ramp of the batch within a stage: the rate goes on as it would with one segment."""
    run = dataclasses.replace(RUN, stages=(BASE, DECAY))
    fixed = dict(seq_len=5, accumulate=1, rope_base_global=1e4)
    segments = (
        Segment(BASE, 0, 100, 0, batch_size=2, **fixed),
        Segment(DECAY, 100, 50, 1_000, batch_size=2, **fixed),
        Segment(DECAY, 150, 25, 1_500, batch_size=4, **fixed),
    )
    ramped, plain = Plan(run, segments), Plan.of(run)
    assert ramped.stage_ends == (100, 175) and ramped.total_tokens == plain.total_tokens
    for step in range(150, 175):
        assert ramped.tokens_at(step) == plain.tokens_at(150 + 2 * (step - 150))
        assert ramped.learning_rate(step) == plain.learning_rate(150 + 2 * (step - 150))


def test_knobs_are_float32_scalars_of_the_step():
    weights = dict(model__moe__switch_weight=0.0, model__moe__z_weight=0.25)
    run = build(RunConfig, tiny_config(optimizer__z_loss_weight=0.5, **weights))
    stages = (BASE, dataclasses.replace(DECAY, rope_base_global=5e4))
    made = Plan.of(dataclasses.replace(run, stages=stages))
    knobs = made.knobs(100)
    assert {leaf.dtype for leaf in jax.tree.leaves(knobs)} == {np.dtype(np.float32)}
    assert knobs.learning_rate == np.float32(made.learning_rate(100))
    assert made.knobs(99).rope_base_global == 1e4 and knobs.rope_base_global == 5e4
    assert knobs.z_loss_weight == 0.5 and knobs.balance_weights["z"] == 0.25
    # What no step of the run uses is not there at all; the rest never changes its structure.
    assert "switch" not in knobs.balance_weights and "partition" in knobs.balance_weights
    assert jax.tree.structure(made.knobs(0)) == jax.tree.structure(knobs)
    dense = dataclasses.replace(run.model, moe=dataclasses.replace(run.model.moe, num_experts=0))
    assert Plan.of(dataclasses.replace(run, model=dense)).knobs(0).balance_weights == {}


def test_meta_says_where_in_the_run_a_checkpoint_is():
    made = plan((BASE, dataclasses.replace(DECAY, rope_base_global=5e4, seq_len=10)))
    metas = [made.meta(steps) for steps in (0, 100, 101, 150)]
    assert [meta.stage for meta in metas] == ["a", "a", "b", "b"]
    assert [meta.tokens for meta in metas] == [0, 1_000, 1_020, 2_000]
    assert [meta.seq_len for meta in metas] == [5, 5, 10, 10]
    assert [meta.rope_base_global for meta in metas] == [1e4, 1e4, 5e4, 5e4]
    assert all(meta.config is made.config for meta in metas)


BILLIONS = 20_000_000_000


def long_stages():
    """Stages of 20 billion tokens, with a seam at no multiple of any power of two."""
    shape = dict(batch_size=1000, seq_len=4096, tokens=BILLIONS + 1)
    warm = dataclasses.replace(BASE, **shape, warmup_tokens=2**31 + 5)
    cool = dataclasses.replace(DECAY, **shape, decay_tokens=BILLIONS // 2)
    short = dict(shape, tokens=2**33, decay_tokens=2**32, warmup_tokens=2**32)
    return warm, cool, dataclasses.replace(DECAY, name="c", **short)


# Case D6
@pytest.mark.parametrize("decay", ["linear", "cosine", "sqrt"])
def test_stages_beyond_int32_are_counted_exactly(decay):
    first, *rest = long_stages()
    stages = (first, *(dataclasses.replace(stage, decay=decay) for stage in rest))
    made = plan(stages)
    step_tokens = 1000 * 4096
    lengths = [-(-stage.tokens // step_tokens) for stage in stages]
    ends = np.cumsum(lengths).tolist()
    assert list(made.stage_ends) == ends
    assert made.total_tokens == sum(lengths) * step_tokens > 2**35
    corners = [0, 1, *ends, *(end - 1 for end in ends), *(end + 1 for end in ends)]
    corners += [2**31 // step_tokens + i for i in range(-1, 3)]  # the end of the warm-up
    for end, length in zip(ends, lengths, strict=True):
        corners += [end - length // 2 + i for i in range(-1, 2)]
    for step in corners:
        tokens = made.tokens_at(step)
        assert type(tokens) is int and tokens == step * step_tokens
        rate = oracle(stages, tokens)
        assert made.learning_rate(step) == pytest.approx(rate, rel=1e-12, abs=1e-12)
        assert math.isfinite(rate) and made.knobs(step).learning_rate == np.float32(rate)
        meta = to_dict(made.meta(step))
        assert json.loads(json.dumps(meta["tokens"])) == tokens
        assert CheckpointMeta.parse(meta).tokens == tokens


# Case D6
def test_what_counts_tokens_of_a_run_is_no_int32():
    made = plan(long_stages())
    throughput = Throughput()
    for _ in range(3):
        throughput.count(made.total_tokens)
    lap = throughput.end_lap()
    assert lap["tokens_per_second"] > 2**35
    model = RUN.model
    assert accounting.attention_pairs(BILLIONS) == BILLIONS * (BILLIONS + 1) // 2
    assert accounting.kv_cache_bytes(model, BILLIONS) % model.attention.head_dim == 0
    assert accounting.attention_flops(model, BILLIONS) > BILLIONS**2
    row = {"step": made.total_steps, "tokens": made.total_tokens, **lap}
    assert json.loads(json.dumps(plain(row))) == row


# Case D6
def test_devices_count_steps_and_the_tokens_of_one_step_in_int32_and_nothing_else():
    run = dataclasses.replace(RUN, stages=RUN.stages[:1])
    stage = dataclasses.replace(run.stages[0], batch_size=2, seq_len=16)
    run = dataclasses.replace(run, stages=(stage,))
    optimizer = make_optimizer(run.optimizer, lm.logical_axes(run.model))
    train = functools.partial(train_step, run, optimizer, accumulate=1)
    state = jax.eval_shape(lambda: init_state(run, optimizer, 0))
    batch = jax.tree.map(jnp.asarray, random_batch(2, 16, 64))
    after, metrics = jax.eval_shape(train, state, batch, Plan.of(run).knobs(0))

    def counters(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        whole = [path for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.integer)]
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path in whole}

    # The optimizer's count stops at the largest int32.
    assert {name.split("/")[-1] for name in counters(after)} == {"step", "bad_steps", "count"}
    assert counters(metrics) == {"bad_steps", "target_tokens"}
