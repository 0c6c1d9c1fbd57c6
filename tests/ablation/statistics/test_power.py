"""The planner's number of seeds reaches its power, in sweeps that are simulated and compared."""

import numpy as np
import pytest
from scipy import stats

from lightning_jax.ablation.statistics.intervals import intervals
from lightning_jax.ablation.statistics.power import power, seeds_needed
from lightning_jax.config.errors import UserError


def attained(seeds, deviation, margin, arms, true, replicates=2000):
    """Share of simulated sweeps whose first arm gets the right verdict."""
    generator = np.random.default_rng([seeds, arms])
    scores = generator.normal(size=(replicates, arms + 1, seeds)) * deviation / np.sqrt(2)
    scores += generator.standard_t(2, size=(replicates, 1, seeds))
    scores[:, 1] += true
    found = intervals(scores)
    low, high = found.low_RM[:, 0], found.high_RM[:, 0]
    equivalent = (low > -margin) & (high < margin)
    worse = (low >= 0) & ~equivalent
    right = equivalent if true == 0 else worse if true >= margin else equivalent | worse
    return right.mean()


@pytest.mark.parametrize("true", [0.0, 0.4, 1.0, 1.5])
@pytest.mark.parametrize(("arms", "deviation"), [(1, 0.8), (3, 1.2), (10, 0.5), (10, 1.0)])
def test_the_number_of_seeds_reaches_its_power(arms, deviation, true):
    seeds = seeds_needed(deviation, 1.0, arms=arms, true_difference=true)
    rate = attained(seeds, deviation, 1.0, arms, true)
    assert rate == pytest.approx(
        power(seeds, deviation, 1.0, arms=arms, true_difference=true), abs=0.03
    )
    assert rate > 0.77
    if seeds > 2:
        assert power(seeds - 1, deviation, 1.0, arms=arms, true_difference=true) < 0.8


def test_one_arm_is_the_noncentral_t_test():
    """True differences beyond the margin: power of the paired t-test, of a known distribution."""
    for seeds, true in ((4, 2.0), (9, 1.1), (30, 0.6)):
        shift, critical = true * np.sqrt(seeds), stats.t.ppf(0.975, seeds - 1)
        expected = stats.nct.sf(critical, seeds - 1, shift)
        found = power(seeds, 1.0, 1e-3, arms=1, true_difference=true)
        assert found == pytest.approx(expected, abs=0.01)


def test_a_pilot_of_few_seeds_asks_for_more():
    known = seeds_needed(0.5, 0.5, arms=2)
    numbers = [seeds_needed(0.5, 0.5, arms=2, pilot_degrees=n) for n in (40, 8, 4)]
    assert [known, *numbers] == sorted([known, *numbers]) and numbers[-1] > known


def test_the_plan_from_a_pilot_has_its_power_in_the_mean():
    generator = np.random.default_rng(0)
    arms, degrees, true_deviation = 3, 6, 0.4
    rates = []
    for square in generator.chisquare(degrees, 60) / degrees:
        pilot = true_deviation * np.sqrt(square)
        seeds = seeds_needed(pilot, 0.5, arms=arms, pilot_degrees=degrees)
        rates.append(power(seeds, true_deviation, 0.5, arms=arms))
    assert np.mean(rates) >= 0.78


def test_separate_deviations_need_more_seeds():
    numbers = [seeds_needed(0.4, 0.5, arms=4, pooled=pooled) for pooled in (True, False)]
    assert numbers[0] < numbers[1]


def test_limits():
    assert seeds_needed(0.0, 0.1, arms=3) == 2
    assert seeds_needed(0.0, 0.1, arms=3, least=7) == 7
    assert seeds_needed(1.0, 0.1, arms=3) is None
    assert seeds_needed(1.0, 1.0, arms=1, most=10) is None
    assert seeds_needed(1.0, 1.0, arms=1, least=300) is None
    # More noise, more arms or a smaller margin never need fewer seeds.
    assert seeds_needed(0.5, 0.5, arms=1) <= seeds_needed(0.5, 0.5, arms=8)
    assert seeds_needed(0.5, 0.5, arms=1) < seeds_needed(0.5, 0.3, arms=1)
    assert power(5, 0.5, 0.5, arms=2, true_difference=-0.7) == power(
        5, 0.5, 0.5, arms=2, true_difference=0.7
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": 0}, "margin = 0: must be"),
        ({"deviation": -1}, "deviation = -1: must be"),
        ({"arms": 0}, "arms = 0: must be"),
        ({"seeds": 1}, "seeds = 1: must be at least 2"),
        ({"pilot_degrees": 0}, "pilot_degrees = 0: must be"),
        ({"confidence": 1}, "confidence = 1: must be"),
        ({"true_difference": np.nan}, "true_difference = nan: must be"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(UserError, match=message):
        power(**{"seeds": 3, "deviation": 1.0, "margin": 1.0, "arms": 2, **changes})


def test_a_power_is_below_one():
    with pytest.raises(UserError, match="power = 80"):
        seeds_needed(1.0, 1.0, arms=1, power=80)
