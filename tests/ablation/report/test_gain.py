"""The gain of an arm is read off the baseline's own scaling."""

import pytest

from lightning_jax.ablation.report import gain
from tests.ablation.fake_runs import small_sweep


def runs(flops, *losses):
    return {seed: {"train_flops": flops, "bits_per_byte": loss} for seed, loss in enumerate(losses)}


def test_an_arm_that_needs_half_the_compute_gains_two():
    sweep = small_sweep(scaling=(0.25, 4.0))
    # loss = 4 FLOPs^-0.5 for one seed, 5 FLOPs^-0.5 for the other.
    rows = {
        "full": runs(4.0, 2.0, 2.5),
        "full@0.25": runs(1.0, 4.0, 5.0),
        "full@4": runs(16.0, 1.0, 1.25),
        "shared": runs(2.0, 2.0, 2.5),
        "hybrid": {},
    }
    found = gain.summarize(sweep, rows)
    assert [budget["share"] for budget in found["budgets"]] == [0.25, 1.0, 4.0]
    assert set(found["gains"]) == {"shared"}
    got = found["gains"]["shared"]
    assert got["value"] == pytest.approx(2.0, rel=0.02) and not got["extrapolated"]
    assert got["seeds"] == [0, 1] and got["flops"] == 2.0
    assert "at 0.25, 1, 4 times its tokens, fitted to each of 2 seeds" in found["sentence"]


@pytest.mark.parametrize("smaller", [{}, {7: {"train_flops": 1.0, "bits_per_byte": 3.0}}])
def test_without_two_budgets_of_a_common_seed_there_is_no_fit(smaller):
    sweep = small_sweep(scaling=(0.5,))
    rows = {"full": runs(2.0, 2.0), "full@0.5": smaller, "shared": {}, "hybrid": {}}
    assert gain.summarize(sweep, rows) is None
    assert gain.summarize(small_sweep(), {arm: {} for arm in small_sweep().arms}) is None
