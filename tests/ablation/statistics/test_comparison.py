"""Verdicts follow from their intervals, and say what is not known."""

import math

import numpy as np
import pytest
from scipy import stats

from lightning_jax.ablation.statistics.comparison import compare, sentence
from lightning_jax.config.errors import UserError

# Bits per byte of two arms with four seeds; one seed is far off in both.
PILOT = {
    "G": {0: 2.5467, 1: 2.5489, 2: 2.5838, 3: 2.7512},
    "LLLG": {0: 2.5180, 1: 2.5242, 2: 2.5458, 3: 2.7445},
}


def by_seed(*values):
    return dict(enumerate(values))


def simulate(generator, true, seeds, deviation=1.0):
    """Scores of arms that differ by `true` from a baseline `b`; seeds differ wildly."""
    seed_effects = 10 * generator.standard_t(2, size=seeds)
    shifts = {"b": 0.0, **{f"arm{index}": shift for index, shift in enumerate(true)}}
    return {
        arm: by_seed(*(seed_effects + shift + generator.normal(0, deviation / math.sqrt(2), seeds)))
        for arm, shift in shifts.items()
    }


def test_a_pilot_by_hand():
    found = compare(PILOT, "G", margin=0.005 * 2.6)
    changes = np.array([PILOT["LLLG"][s] - PILOT["G"][s] for s in range(4)])
    low, high = stats.t.interval(0.95, 3, loc=changes.mean(), scale=stats.sem(changes))
    difference = found.differences["LLLG"]
    assert (difference.low, difference.high) == pytest.approx((low, high))
    assert difference.mean == pytest.approx(changes.mean())
    assert difference.p == pytest.approx(stats.ttest_1samp(changes, 0).pvalue, rel=1e-4)
    assert difference.verdict == "better" and difference.seeds == (0, 1, 2, 3)
    assert found.deviation == pytest.approx(changes.std(ddof=1)) and found.degrees == 3
    assert "Student" in found.method and found.homogeneity_p is None
    assert list(found.differences) == ["LLLG"]


def test_what_is_common_to_a_seed_does_not_matter():
    shifted = {arm: {s: v + 100.0 * s**2 for s, v in of.items()} for arm, of in PILOT.items()}
    expected = compare(PILOT, "G", margin=0.01).differences["LLLG"]
    found = compare(shifted, "G", margin=0.01).differences["LLLG"]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


# Intervals of one arm: mean of +-1 noise times a scale, around a shift.
@pytest.mark.parametrize(
    ("shift", "scale", "lower_is_better", "verdict"),
    [
        (2.0, 0.3, True, "worse"),
        (-2.0, 0.3, True, "better"),
        (2.0, 0.3, False, "better"),
        (-2.0, 0.3, False, "worse"),
        (0.1, 0.3, True, "equivalent"),
        (0.5, 0.1, True, "equivalent"),  # a real difference, but below the margin
        (0.5, 0.6, True, "undecided"),
        (1.0, 0.1, True, "worse"),  # real, and around the margin
        (0.0, 5.0, True, "undecided"),
    ],
)
def test_verdicts(shift, scale, lower_is_better, verdict):
    noise = np.array([1, -1, 1, -1, 0.5, -0.5])
    scores = {"b": by_seed(*np.arange(6.0)), "a": by_seed(*(np.arange(6) + shift + scale * noise))}
    found = compare(scores, "b", margin=1.0, lower_is_better=lower_is_better).differences["a"]
    assert found.verdict == verdict
    assert (found.p <= 0.05) == (not found.low < 0 < found.high)
    assert (found.p_equivalent <= 0.05) == (found.low > -1 and found.high < 1)
    assert found.seeds_needed is None or (verdict == "undecided" and found.seeds_needed > 6)


def test_equivalence_is_two_one_sided_tests():
    """Each at half of 1 - confidence, so the p-value is twice that of the nearer side."""
    changes = np.array([0.1, -0.2, 0.3, 0.0, 0.2])
    scores = {"b": by_seed(*np.zeros(5)), "a": by_seed(*changes)}
    found = compare(scores, "b", margin=0.5).differences["a"]
    sides = [
        stats.ttest_1samp(changes, 0.5, alternative="less").pvalue,
        stats.ttest_1samp(changes, -0.5, alternative="greater").pvalue,
    ]
    assert found.p_equivalent == pytest.approx(2 * max(sides), rel=1e-4)


def test_dunnett_matches_the_formula():
    generator = np.random.default_rng(4)
    scores = simulate(generator, (0, 0.5, 1), 6)
    found = compare(scores, "b", margin=0.1, plan=False)
    assert "Dunnett" in found.method and found.degrees == 15
    table = np.array([list(of.values()) for of in scores.values()])
    residuals = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    deviation = math.sqrt(2 * (residuals**2).sum() / 15)
    assert found.deviation == pytest.approx(deviation)
    widths = [(d.high - d.low) / 2 for d in found.differences.values()]
    # The critical value of three arms and 15 degrees is 2.61; noisier arms have wider intervals.
    assert min(widths) >= 2.61 * deviation / math.sqrt(6) * 0.995


def test_a_noisy_arm_has_an_interval_of_its_own():
    generator = np.random.default_rng(2)
    scores = simulate(generator, (0, 0, 0), 10)
    scores["arm2"] = by_seed(*(value + generator.normal(0, 20) for value in scores["b"].values()))
    found = compare(scores, "b", margin=0.1, plan=False)
    assert "Holm" in found.method and found.deviation is None and found.degrees == 9
    assert found.homogeneity_p < 0.01
    widths = [difference.high - difference.low for difference in found.differences.values()]
    assert widths[2] > 5 * max(widths[:2])
    deviations = [difference.deviation for difference in found.differences.values()]
    expected = [scores["arm0"][seed] - scores["b"][seed] for seed in range(10)]
    assert deviations[0] == pytest.approx(np.std(expected, ddof=1))


def test_killed_runs_are_left_out():
    scores = {
        "b": by_seed(2.0, 2.11, 1.9, 2.3),
        "a": {0: 2.5, 2: 2.41, 3: 2.79},
        "one": {1: 2.6},
        "other": {7: 2.6, 8: 2.5},
        "none": {},
        "c": by_seed(1.9, 2.0, 1.81, 2.21),
    }
    found = compare(scores, "b", margin=0.01).differences
    assert list(found) == ["a", "one", "other", "none", "c"]
    assert found["a"].verdict == "worse" and found["a"].seeds == (0, 2, 3)
    assert found["one"].mean == pytest.approx(0.49) and found["one"].seeds == (1,)
    for arm in ("one", "other", "none"):
        assert found[arm].verdict == "undecided"
        values = (found[arm].low, found[arm].high, found[arm].p, found[arm].seeds_needed)
        assert values == (None,) * 4
    assert found["other"].mean is None and found["none"].mean is None
    # What has no interval does not widen those of the others.
    rest = {arm: scores[arm] for arm in ("b", "a", "c")}
    assert compare(rest, "b", margin=0.01).differences["c"].low == found["c"].low


def test_without_two_seeds_there_are_no_intervals():
    found = compare({"b": {0: 1.0}, "a": {0: 2.0}}, "b", margin=0.1)
    assert found.degrees == 0 and found.deviation is None
    assert "no intervals" in found.method
    assert compare({"b": {0: 1.0}}, "b", margin=0.1).differences == {}


def test_runs_that_repeat_each_other():
    seeds = (2.0, 2.1, 1.9)
    same, shifted = by_seed(*seeds), by_seed(*(value + 0.5 for value in seeds))
    found = compare({"b": same, "same": same, "other": shifted}, "b", margin=0.01).differences
    equal, other = found["same"], found["other"]
    assert (equal.mean, equal.low, equal.high, equal.p) == (0, 0, 0, 1)
    assert equal.verdict == "equivalent" and equal.p_equivalent == 0
    assert other.verdict == "worse" and other.p == 0 and other.low == pytest.approx(0.5)


def test_the_order_of_arms_and_seeds_does_not_matter():
    scores = simulate(np.random.default_rng(9), (0.3, 1.0, 0.0), 5)
    turned = {arm: dict(reversed(scores[arm].items())) for arm in reversed(scores)}
    expected = compare(scores, "b", margin=0.5, plan=False).differences
    found = compare(turned, "b", margin=0.5, plan=False).differences
    for arm in expected:
        assert found[arm].verdict == expected[arm].verdict
        assert found[arm].low == pytest.approx(expected[arm].low)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "LLG"}, 'baseline = .*did you mean "LLLG"'),
        ({"margin": 0.0}, "margin = 0.0: must be a number above 0"),
        ({"margin": math.nan}, "margin = nan"),
        ({"confidence": 95}, "confidence = 95: must be"),
        ({"scores": {"G": {0: math.inf}}}, "score of G seed 0 = inf: must be finite"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"scores": PILOT, "baseline": "G", "margin": 0.01, **changes}
    with pytest.raises(UserError, match=message):
        compare(arguments.pop("scores"), arguments.pop("baseline"), **arguments)


def said(changes, margin, baseline=2.0):
    scores = {"G": by_seed(*[baseline] * len(changes)), "L": by_seed(*(baseline + changes))}
    found = compare(scores, "G", margin=margin).differences["L"]
    return sentence("L", "G", found, baseline)


def test_sentences():
    noise = np.array([1, -1, 1, -1.0]) * 0.001
    # half width: 3.182 * 0.001155 / 2 = 0.00184, 0.09% of 2
    assert said(noise - 0.01, 0.002) == (
        "L needs 0.50% fewer bits per byte than G (95%: 0.41% to 0.59%): better."
    )
    assert said(noise + 0.01, 0.002) == (
        "L needs 0.50% more bits per byte than G (95%: 0.41% to 0.59%): worse."
    )
    assert said(noise + 0.001, 0.01) == (
        "L is equivalent to G: bits per byte differ by less than 0.5% "
        "(95%: 0.04% fewer to 0.14% more)."
    )
    assert said(noise - 0.004, 0.01) == (
        "L is equivalent to G: it needs 0.20% fewer bits per byte (95%: 0.11% to 0.29%), a real "
        "difference but below the margin of 0.5%."
    )
    assert said(noise * 1000, 0.01).endswith(": a margin of 0.5% needs more than 200 seeds.")
    undecided = said(10 * noise, 0.01)
    assert undecided.startswith("L against G is undecided (95%: 0.92% fewer to 0.92% more): ")
    assert undecided.endswith(" seeds would decide a margin of 0.5%.")
    assert said(np.array([0.01]), 0.01) == (
        "L against G is undecided: one seed (0.50% more bits per byte) has no interval."
    )
    assert said(np.array([0, 0.0]), 0.01).endswith("(95%: 0.00% to 0.00%).")


def test_sentence_without_a_common_seed_and_of_another_metric():
    found = compare({"G": {0: 1.0}, "L": {1: 1.0}}, "G", margin=0.1).differences["L"]
    assert sentence("L", "G", found, 1.0) == (
        "L against G is undecided: no seed has a result of both."
    )
    scores = {"G": by_seed(5, 6, 4), "L": by_seed(15, 16, 14)}
    found = compare(scores, "G", margin=7.5).differences["L"]
    assert sentence("L", "G", found, 5, metric="nats per token") == (
        "L needs 200.00% more nats per token than G (95%: 200.00% to 200.00%): worse."
    )
    same = compare({"G": scores["G"], "L": scores["G"]}, "G", margin=7.5).differences["L"]
    assert "differ by less than 150% (95%" in sentence("L", "G", same, 5)
    with pytest.raises(UserError, match="relative_to = 0"):
        sentence("L", "G", found, 0)
