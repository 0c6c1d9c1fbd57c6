"""Tokens, FLOPs and seconds of a training, from its config and the rows that it logged."""

import dataclasses

import pytest

from lightning_jax import accounting
from lightning_jax.ablation import training_cost
from lightning_jax.ablation.training_cost import Measured
from lightning_jax.config.errors import UserError
from tests.tiny import tiny_run, write_corpus

# Six steps of 128 tokens, then four.
RUN = tiny_run("corpus.jsonl", model__vocab_size=64)


def row(step, stage, tokens, speed=10.0, **more):
    return {
        "step": step,
        "stage": stage,
        "tokens": tokens,
        "loss": 2.0,
        "tokens_per_second": speed,
        **more,
    }


ROWS = [
    row(1, "stable", 100, 1.0, mean_experts=[4.0, 8.0]),
    {"step": 1, "eval": {}},
    row(2, "stable", 200, 50.0, mean_experts=[2.0, 2.0]),
    row(4, "stable", 500, 70.0, mean_experts=[1.0, 2.0]),
    row(5, "decay", 600, 30.0, mean_experts=[1.0, 1.0]),
]


def test_experts_are_weighted_by_tokens_and_speed_is_a_median():
    found = training_cost.measured(ROWS, "here")
    # 100 tokens of 6 experts, 100 of 2, 300 of 1.5.
    assert found["stable"] == Measured((600 + 200 + 450) / 500, 50.0)
    assert found["decay"] == Measured(1.0, 30.0)


def test_a_capacity_drops_experts():
    found = training_cost.measured(
        [row(1, "s", 10, mean_experts=[2.0, 4.0], dropped_share=[0.5, 0.25])], "here"
    )
    assert found["s"].experts_per_token == 2.0


def test_dense_models_measure_no_experts():
    assert training_cost.measured([row(1, "s", 10)], "here")["s"] == Measured(None, 10.0)
    assert training_cost.measured([], "here") == {}


def test_damaged_experts_are_named():
    with pytest.raises(UserError, match="here: mean_experts = 'x': must be a list"):
        training_cost.measured([row(1, "s", 10, mean_experts="x")], "here")
    for found in (dict(mean_experts=[]), dict(mean_experts=[1, 2], dropped_share=[0.5])):
        with pytest.raises(UserError, match="here: mean_experts, dropped_share = .*: must be numb"):
            training_cost.measured([row(1, "s", 10, **found)], "here")


def test_flops_count_the_experts_of_each_stage():
    stages = {"stable": Measured(3.0, 1.0), "decay": Measured(1.0, 1.0)}
    by_hand = sum(
        tokens * accounting.flops_per_token(RUN.model, seq_len=32, experts_per_token=experts)
        for tokens, experts in ((6 * 128, 3.0), (4 * 128, 1.0))
    )
    assert training_cost.training_flops(RUN, stages) == pytest.approx(by_hand)
    # One expert more in a stage: three passes of two FLOPs for each of its parameters.
    more = training_cost.training_flops(RUN, {**stages, "decay": Measured(2.0, 1.0)})
    assert more and more - by_hand == pytest.approx(4 * 128 * 6 * 2 * 3 * 32 * 16)
    assert training_cost.tokens(RUN) == 10 * 128


def test_flops_without_measured_experts_are_those_of_the_config():
    nominal = 10 * 128 * accounting.flops_per_token(RUN.model, seq_len=32)
    assert training_cost.training_flops(RUN, {}) == pytest.approx(nominal)


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        (dict(), True),
        (dict(target_experts=0.0), False),
        (dict(target_experts=0.0, train_routing="top_k"), True),
        (dict(target_experts=0.0, train_routing="dense"), True),
        (dict(target_experts=0.0, num_experts=0), True),
        (dict(capacity_factor=1.0), False),
    ],
)
def test_what_a_fixed_p_and_a_capacity_use_must_be_measured(changes, known):
    moe = dataclasses.replace(RUN.model.moe, **changes)
    assert training_cost.is_known(moe) is known
    run = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, moe=moe))
    assert (training_cost.training_flops(run, {}) is None) is not known


def test_a_calibration_tells_only_what_the_config_does_not():
    stages = {"stable": Measured(3.0, 1.0), "decay": Measured(1.0, 1.0)}
    assert training_cost.expected_flops(RUN, stages) == training_cost.training_flops(RUN, {})
    moe = dataclasses.replace(RUN.model.moe, target_experts=0.0)
    run = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, moe=moe))
    assert training_cost.expected_flops(run, stages) == training_cost.training_flops(run, stages)


def test_seconds_follow_the_speed_of_each_stage():
    stages = {"stable": Measured(None, 100.0), "decay": Measured(None, 50.0)}
    assert training_cost.training_seconds(RUN, stages) == 6 * 128 / 100 + 4 * 128 / 50


def test_a_vocabulary_is_the_tokenizers_unless_the_config_says_it(tmp_path):
    run = tiny_run(write_corpus(tmp_path))
    found = training_cost.with_vocabularies([run, RUN, run])
    assert [config.model.vocab_size for config in found] == [272, 64, 272]
    assert dataclasses.replace(found[0], model=run.model) == run
