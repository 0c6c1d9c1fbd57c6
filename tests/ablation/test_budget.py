"""Arms get the tokens that cost what the baseline's cost."""

import json

import pytest

from lightning_jax.ablation import budget, results, training_cost
from lightning_jax.ablation.results import Run
from lightning_jax.ablation.sweep import override
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.train import loop
from lightning_jax.train.plan import Plan
from tests.ablation.fake_runs import small_sweep
from tests.tiny import tiny_config, tiny_run, write_corpus

# 100 steps of 64 tokens, then 50.
STAGES = {
    f"stages__{name}__{field}": value
    for name, tokens in (("stable", 6400), ("decay", 3200))
    for field, value in dict(
        tokens=tokens, batch_size=4, seq_len=16, warmup_tokens=0, decay_tokens=0
    ).items()
}
TOP_P = {"model.moe.target_experts": 0.0, "model.moe.top_p": 0.5}


def routed_sweep(**changes):
    """A controller that holds 2 experts, twice as wide experts, and fixed top-p."""
    shared = dict(model__moe__num_shared_experts=0)
    base = tiny_config(model__num_units=1, model__vocab_size=64, **shared, **STAGES)
    arms = {"held": {}, "wide": {"model.moe.expert_dim": 32}, "fixed": TOP_P}
    values = dict(base=base, arms=arms, baseline="held", budget="flops", factors={"p": [*TOP_P]})
    return small_sweep(**{**values, **changes})


def trainer(experts=4.0, speed=100.0, made=None):
    """Returns what writes the files of a run instead of training it."""

    def train(config, folder):
        if made is not None:
            made.append(folder.name)
        folder.mkdir(parents=True)
        rows = [
            {
                "step": step + 1,
                "stage": plan.segment_at(step).stage.name,
                "tokens": plan.tokens_at(step + 1),
                "loss": 2.0,
                "tokens_per_second": speed * config.model.attention.window,
                "mean_experts": [experts, experts + 1],
            }
            for plan in [Plan.of(config)]
            for step in range(plan.total_steps)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)
        (folder / "evaluation.json").write_text("{}")

    return train


def flops(sweep, arm, scale, experts=None):
    """Training FLOPs of an arm with so many experts in every stage."""
    [config] = training_cost.with_vocabularies([sweep.config(Run(arm, 0), tokens=scale)])
    measured = training_cost.Measured(experts, 1.0)
    return training_cost.training_flops(config, {s.name: measured for s in config.stages})


def test_equal_tokens_need_nothing(tmp_path):
    assert budget.scales(small_sweep(scaling=[2]), tmp_path) == {
        "full": 1.0,
        "shared": 1.0,
        "hybrid": 1.0,
        "full@2": 1.0,
    }
    assert not list(tmp_path.iterdir())


def test_windows_count_in_equal_flops(tmp_path):
    base = tiny_config(
        model__num_units=1, model__vocab_size=64, model__moe__num_experts=0, **STAGES
    )
    sweep = small_sweep(base=base, budget="flops")
    found = budget.scales(sweep, tmp_path)
    # A borrower computes no keys and values; a window of 8 sees 100 of the 136 pairs of 16 tokens.
    assert found["full"] == 1 and found["shared"] > found["hybrid"] > 1
    layer = 2 * (2 * 32 * 32 + 2 * 32 * 2 * 8 + 3 * 32 * 48)
    pairs = 4 * 4 * 8 / 16
    full = 2 * layer + 2 * 136 * pairs + 2 * 32 * 64
    assert found["hybrid"] == pytest.approx(full / (full - 36 * pairs))
    assert found["shared"] == pytest.approx(full / (full - 2 * 2 * 32 * 2 * 8))
    for arm in sweep.arms:
        # To half of a step of each stage.
        assert flops(sweep, arm, found[arm]) == pytest.approx(flops(sweep, "full", 1), rel=0.01)
    assert not list(tmp_path.iterdir())


def test_measured_experts_count_in_equal_flops(tmp_path):
    sweep, made = routed_sweep(scaling=[0.5]), []
    found = budget.scales(sweep, tmp_path, train=trainer(experts=3.5, made=made))
    # The controller's target says what the other two use.
    assert made == ["fixed"]
    assert found["held"] == found["held@0.5"] == 1
    assert flops(sweep, "fixed", found["fixed"], 4.0) == pytest.approx(
        flops(sweep, "held", 1, 2.0), rel=0.01
    )
    assert found["wide"] == pytest.approx(found["fixed"], rel=1e-6)
    # What has been measured stays, with more seeds too.
    more = routed_sweep(scaling=[0.5], seeds=(0, 1, 2, 3))
    assert budget.scales(more, tmp_path) == found


def test_equal_time_is_measured_for_every_arm(tmp_path):
    arms = {"slow": {}, "fast": {"model.attention.window": 16}}
    sweep = small_sweep(base=tiny_config(**STAGES), arms=arms, baseline="slow", budget="time")
    made = []
    found = budget.scales(sweep, tmp_path, train=trainer(made=made))
    assert made == ["slow", "fast"] and found == {"slow": 1.0, "fast": 2.0}


def test_a_calibration_of_speed_is_short_and_has_every_stage():
    config = budget.calibration_config(routed_sweep(budget="time"), "wide")
    # 16 steps of the shorter stage.
    assert [stage.tokens for stage in config.stages] == [32 * 64, 16 * 64]
    assert config.seed == 0 and config.eval_every == 0
    base = tiny_config(model__num_units=1, **{**STAGES, "stages__stable__tokens": 64})
    config = budget.calibration_config(small_sweep(base=base), "full")
    assert [stage.tokens for stage in config.stages] == [64, 3200]


def test_a_calibration_of_experts_has_all_tokens():
    config = budget.calibration_config(routed_sweep(), "fixed")
    assert [stage.tokens for stage in config.stages] == [6400, 3200] and config.log_every == 1


def test_a_sweep_waits_for_its_calibration(tmp_path):
    sweep = routed_sweep()
    assert budget.uncalibrated(sweep, tmp_path) == ["fixed"]
    assert budget.known_scales(sweep, tmp_path)["fixed"] is None
    with pytest.raises(UserError, match="arm 'fixed': budget = 'flops' needs its calibration"):
        budget.scales(sweep, tmp_path)
    budget.scales(sweep, tmp_path, train=trainer())
    assert not budget.uncalibrated(sweep, tmp_path)


def test_a_calibration_that_was_cut_goes_on(tmp_path):
    sweep, made = routed_sweep(), []

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        budget.scales(sweep, tmp_path, train=stop)
    trainer()(budget.calibration_config(sweep, "fixed"), tmp_path / "calibration" / "fixed")
    budget.scales(sweep, tmp_path, train=trainer(made=made))
    assert not made


def test_a_calibration_that_fails_names_its_arm(tmp_path):
    def fail(*_):
        raise UserError("loss is not finite at step 3")

    with pytest.raises(UserError, match="arm 'fixed': its calibration failed: loss is not finite"):
        budget.scales(routed_sweep(), tmp_path, train=fail)
    assert not (tmp_path / budget.FILE).exists()


def test_another_config_than_the_calibrated_one_is_refused(tmp_path):
    budget.scales(routed_sweep(), tmp_path, train=trainer())
    sweep = routed_sweep(arms={"held": {}, "fixed": {**TOP_P, "model.moe.top_p": 0.3}})
    with pytest.raises(UserError, match="arm 'fixed': .*calibration.json has measured another"):
        budget.scales(sweep, tmp_path, train=trainer())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ('{"fixed": 3}', "fixed = 3: must be an object"),
        ('{"fixed": {}}', "fixed: lacks config"),
        ('{"fixed": {"config": "", "stages": {"stable": 3}}}', "'stable': 3}: must be an object"),
        ('{"fixed": {"config": "", "stages": {"stable": {}}}}', "stable: lacks experts_per_token"),
    ],
)
def test_a_damaged_calibration_is_named(tmp_path, text, message):
    (tmp_path / budget.FILE).write_text(text)
    with pytest.raises(UserError, match=f"calibration.json.*{message}"):
        budget.scales(routed_sweep(), tmp_path)


def rows_of(**spent):
    return [
        {"arm": arm, "train_tokens": t, "train_flops": f, "tokens_per_second": speed}
        for arm, (t, f, speed) in spent.items()
    ]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tokens", "shared trained with 10.0% fewer tokens than full"),
        ("flops", "shared trained with 5.0% more FLOPs than full"),
        ("time", "shared trained with 55.0% less time than full"),
    ],
)
def test_budgets_that_were_not_equal_are_said(kind, words):
    rows = rows_of(full=(1000, 2e6, 1.0), shared=(900, 2.1e6, 2.0), hybrid=(1010, 1.99e6, 1.0))
    found = budget.mismatches(small_sweep(budget=kind), rows)
    assert found == [f"Unequal budgets: {words}."]


def test_what_is_not_known_is_not_compared():
    rows = rows_of(shared=(900, None, None))
    assert not budget.mismatches(small_sweep(budget="flops"), rows)
    rows = rows_of(full=(1000, None, None), shared=(900, None, None))
    assert not budget.mismatches(small_sweep(budget="time"), rows)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_real_run_measures_its_experts(tmp_path):
    base = override(to_dict(tiny_run(write_corpus(tmp_path))), {"stages.decay": None})
    arms = {"held": {}, "fixed": TOP_P}
    sweep = small_sweep(
        base=base, arms=arms, baseline="held", budget="flops", factors={"p": [*TOP_P]}
    )
    scale = budget.scales(sweep, tmp_path, train=loop.run)["fixed"]
    found = budget.calibrations(sweep, tmp_path)["fixed"]
    assert list(found) == ["stable"] and 1 <= (found["stable"].experts_per_token or 0) <= 4
    # Its cost at the scale is that of the baseline, to half of a step of six.
    used = found["stable"].experts_per_token
    assert flops(sweep, "fixed", scale, used) == pytest.approx(
        flops(sweep, "held", 1, 2.0), rel=0.1
    )
    row = results.run_row(Run("fixed", 0), tmp_path / "calibration" / "fixed")
    assert row["train_flops"] == flops(sweep, "fixed", 1, used)
    assert row["train_tokens"] == 6 * 128
