"""Gains in compute are recovered from power laws, and their intervals cover."""

import math

import numpy as np
import pytest

from lightning_jax.ablation.statistics import scaling
from lightning_jax.config.errors import UserError

UNIT = 1e12  # FLOPs


def law(budget, floor=0.0, slope=0.3):
    return floor + 2.0 * budget**-slope


def exact(budgets, seeds=(0, 1), floor=0.0):
    return {budget * UNIT: {seed: law(budget, floor) for seed in seeds} for budget in budgets}


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("budgets", [(0.25, 0.5, 1, 2), (0.5, 1, 2)])
def test_known_gain(budgets, floor, gain):
    fitted = scaling.fit(exact(budgets, floor=floor))
    assert fitted.floor == pytest.approx(floor, abs=0.01)
    found = scaling.gain(fitted, {0: law(gain, floor), 1: law(gain, floor)}, UNIT)
    assert found.value == pytest.approx(gain, rel=1e-3)
    assert found.low == pytest.approx(gain, rel=1e-3) and found.seeds == (0, 1)
    assert not found.extrapolated


def test_two_budgets_have_no_floor():
    fitted = scaling.fit(exact((0.5, 1), floor=1.0))
    assert fitted.floor == 0
    assert (fitted.least, fitted.most) == (0.5 * UNIT, UNIT)
    assert scaling.gain(fitted, {0: law(1, 1.0)}, UNIT).value == pytest.approx(1)


def test_an_arm_with_other_flops():
    fitted = scaling.fit(exact((0.5, 1, 2)))
    # Half the FLOPs for the same loss.
    found = scaling.gain(fitted, {0: law(1), 1: law(1)}, UNIT / 2)
    assert found.value == pytest.approx(2, rel=1e-3)
    assert scaling.gain(fitted, {0: law(5)}, UNIT).extrapolated
    assert scaling.gain(fitted, {0: law(0.1)}, UNIT).extrapolated


def simulate(generator, gain, budgets, seeds, deviation=0.003):
    """A baseline and an arm; seeds shift both, far more than the noise of one run."""
    shift = 0.05 * generator.standard_t(3, size=seeds)

    def losses(budget):
        noise = np.exp(shift + generator.normal(0, deviation, seeds))
        return dict(enumerate(law(budget) * noise))

    fitted = scaling.fit({budget * UNIT: losses(budget) for budget in budgets})
    return scaling.gain(fitted, losses(gain), UNIT)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("gain", [1.0, 1.3])
def test_intervals_cover(gain, seeds):
    generator = np.random.default_rng([seeds, int(10 * gain)])
    found = [simulate(generator, gain, (0.5, 2), seeds) for _ in range(600)]
    assert np.mean([g.low <= gain <= g.high for g in found]) == pytest.approx(0.95, abs=0.025)
    assert np.median([g.value for g in found]) == pytest.approx(gain, rel=0.01)


def test_what_cannot_be_told():
    fitted = scaling.fit(exact((0.5, 1, 2), floor=1.0))
    beyond = scaling.gain(fitted, {0: 0.9, 1: 0.9}, UNIT)
    assert (beyond.value, beyond.low, beyond.high, beyond.extrapolated) == (None, None, None, True)
    one = scaling.gain(fitted, {1: law(1, 1.0)}, UNIT)
    assert one.value == pytest.approx(1, rel=1e-3) and one.low is None and one.seeds == (1,)
    worse = scaling.fit({UNIT: {0: 2.0, 1: 2.0}, 2 * UNIT: {0: 2.1, 1: 2.1}})
    assert scaling.gain(worse, {0: 1.0, 1: 1.0}, UNIT).value is None
    # Seeds that disagree on whether compute helps at all.
    unsure = scaling.fit({UNIT: {0: 2.0, 1: 2.0}, 2 * UNIT: {0: 1.9, 1: 2.05}})
    found = scaling.gain(unsure, {0: 1.9, 1: 1.9}, UNIT)
    assert found.value > 1 and found.low is None and found.high is None


def test_seeds_without_all_budgets_are_left_out():
    losses = exact((0.5, 1, 2), seeds=(0, 1, 2))
    del losses[UNIT][1]
    assert list(scaling.fit(losses).slopes) == [0, 2]


def test_a_seed_far_off_keeps_the_floor_below_it():
    losses = exact((0.25, 0.5, 1, 2), seeds=(0, 1, 2), floor=1.0)
    for of_budget in losses.values():
        of_budget[2] *= 0.7
    fitted = scaling.fit(losses)
    assert fitted.floor < min(of_budget[2] for of_budget in losses.values())
    assert all(math.isfinite(slope) for slope in fitted.slopes.values())


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({UNIT: {0: 2.0}}, "losses = .*two budgets or more"),
        ({UNIT: {0: 2.0}, 2 * UNIT: {1: 2.0}}, "losses = .*one seed at all budgets"),
        ({UNIT: {0: 2.0}, 2 * UNIT: {0: 0.0}}, "losses = 0.0: must be above 0"),
        ({-UNIT: {0: 2.0}, 2 * UNIT: {0: 1.0}}, "FLOPs = -1000000000000.0: must be above 0"),
    ],
)
def test_bad_points(losses, message):
    with pytest.raises(UserError, match=message):
        scaling.fit(losses)


def test_bad_arms():
    fitted = scaling.fit(exact((0.5, 1)))
    with pytest.raises(UserError, match="flops = 0"):
        scaling.gain(fitted, {0: 1.0}, 0)
    with pytest.raises(UserError, match=r"losses = \[5\]: must be of a seed among \[0, 1\]"):
        scaling.gain(fitted, {5: 1.0}, UNIT)
