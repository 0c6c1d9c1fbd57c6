"""Intervals hold together at the rate that is said, whatever the seeds do."""

import numpy as np
import pytest
from scipy import stats

from lightning_jax.ablation.statistics.intervals import intervals

REPLICATES = 3000
TRUE = np.array([0, 1.0, -0.5, 0, 2, 0, -1.5, 0, 0, 0.2])


def simulate(arms, seeds, deviations=1.0, true=None, replicates=REPLICATES):
    """Scores of a baseline without effect and `arms`; seeds differ wildly, for all arms alike."""
    generator = np.random.default_rng([arms, seeds])
    scores = generator.normal(size=(replicates, arms + 1, seeds))
    scores *= np.broadcast_to(deviations, (arms + 1,))[:, None]
    scores += 5 * generator.standard_t(1.5, size=(replicates, 1, seeds))
    if true is not None:
        scores[:, 1:] += np.asarray(true)[:, None]
    return scores


def coverage(found, true):
    return ((found.low_RM <= true) & (found.high_RM >= true)).all(axis=1).mean()


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("arms", [1, 4, 10])
def test_coverage(arms, seeds):
    true = TRUE[:arms]
    found = intervals(simulate(arms, seeds, true=true))
    assert 0.93 <= coverage(found, true) <= 0.97


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_ten_arms_without_effect_are_left_alone(seeds):
    found = intervals(simulate(10, seeds))
    false = ((found.low_RM >= 0) | (found.high_RM <= 0)).any(axis=1)
    assert false.mean() <= 0.05


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_arms_at_the_margin_are_rarely_called_equivalent(seeds):
    """Two one-sided tests, right for all arms together: five at the margin, five without effect."""
    margin = 8 / np.sqrt(seeds)
    found = intervals(simulate(10, seeds, true=np.tile([margin, 0], 5)))
    equivalent = (found.low_RM > -margin) & (found.high_RM < margin)
    assert equivalent[:, ::2].any(axis=1).mean() <= 0.05
    # The power against arms without effect is worth something.
    assert equivalent[:, 1::2].mean() > 0.8


@pytest.mark.parametrize("seeds", [4, 10])
def test_coverage_of_a_grid_with_gaps(seeds):
    scores = simulate(4, seeds, true=TRUE[:4])
    scores[:, 0, 0] = scores[:, 2, 1] = scores[:, 4, : seeds - 2] = np.nan
    scores[:, 4, 0] = scores[:, 3, 0]
    scores[:, 4, 0] = np.nan
    assert 0.93 <= coverage(intervals(scores), TRUE[:4]) <= 0.97


# Least coverage with 3, 5 and 10 seeds, of ten arms, as docs/statistics.md says.
@pytest.mark.parametrize(
    ("noisy", "factor", "least"),
    [
        ("arm", 2, (0.94, 0.94, 0.94)),
        ("arm", 3, (0.91, 0.925, 0.94)),
        ("baseline", 2, (0.90, 0.925, 0.94)),
        ("baseline", 3, (0.88, 0.92, 0.94)),
        ("half", 2, (0.94, 0.94, 0.94)),
    ],
)
def test_coverage_under_unequal_deviations(noisy, factor, least):
    deviations = np.ones(11)
    deviations[{"arm": slice(10, 11), "baseline": slice(0, 1), "half": slice(6, 11)}[noisy]] = (
        factor
    )
    for seeds, limit in zip((3, 5, 10), least, strict=True):
        found = intervals(simulate(10, seeds, deviations, TRUE), 0.95)
        assert limit <= coverage(found, TRUE) <= 0.985
        # Each interval by itself holds 95%.
        assert ((found.low_RM <= TRUE) & (found.high_RM >= TRUE)).mean() >= 0.945


def test_pooling_makes_three_seeds_useful():
    scores = simulate(10, 3)
    found = intervals(scores)
    width = np.median((found.high_RM - found.low_RM)[found.pooled_R])
    changes = scores[:, 1:] - scores[:, :1]
    own = stats.t.ppf(1 - 0.025 / 10, 2) * np.sqrt(changes.var(2, ddof=1) / 3)
    assert found.pooled_R.mean() == pytest.approx(0.9, abs=0.03)
    assert width < 2 * np.median(own) / 3


def test_one_arm_is_the_paired_t_test():
    scores = simulate(1, 4, true=[0.7], replicates=1)
    found = intervals(scores)
    expected = stats.ttest_rel(scores[0, 1], scores[0, 0])
    low, high = expected.confidence_interval()
    assert (found.low_RM.item(), found.high_RM.item()) == pytest.approx((low, high))
    assert found.p_M().item() == pytest.approx(expected.pvalue, rel=1e-4)


def test_p_values_agree_with_intervals():
    deviations = np.where(np.arange(6) % 2, 1, 3)
    true = np.array([0, 3, -6, 1, 4])
    found = intervals(simulate(5, 5, deviations, true=true, replicates=200))
    assert found.pooled_R.any() and not found.pooled_R.all()
    for replicate in range(200):
        excludes = (found.low_RM[replicate] >= 0) | (found.high_RM[replicate] <= 0)
        np.testing.assert_array_equal(found.p_M(replicate) <= 0.05, excludes)
        for arm in range(5):
            within = found.low_RM[replicate, arm] > -2 and found.high_RM[replicate, arm] < 2
            p = found.equivalence_p(2.0, arm, replicate)
            # Where Holm moves an end to 0, the interval is narrower than the test's.
            assert p <= 0.05 if within and not excludes[arm] else within or p > 0.05


def test_holm_by_hand():
    """Deviations that differ: paired t tests with p-values times 2 and 1."""
    scores = np.array([[[0, 0.1, 0, 0.1], [1, 1.1, 0.9, 1.0], [4, -9.3, 11, 10]]])
    found = intervals(scores)
    assert not found.pooled_R[0]
    changes = scores[0, 1:] - scores[0, 0]
    p = stats.ttest_1samp(changes, 0, axis=1).pvalue
    np.testing.assert_allclose(found.p_M(), [2 * p[0], p[1]])
    half = stats.t.ppf(1 - 0.0125, 3) * stats.sem(changes[0])
    assert found.low_RM[0, 0] == pytest.approx(changes[0].mean() - half)


def test_what_holm_finds_ends_at_zero():
    noise = np.array([1, -1, 1, -1, 0.0])
    # t = 3.1 of 4 degrees: p = 0.036, above Bonferroni's 0.025 and below Holm's second step.
    second = 50 * (noise + 3.1 * np.sqrt(noise.var(ddof=1) / 5))
    scores = np.stack([0.01 * noise[::-1], 10 + 0.01 * noise[[1, 0, 4, 3, 2]], second])
    found = intervals(scores[None])
    assert not found.pooled_R[0]
    assert found.p_M()[1] == pytest.approx(0.036, abs=0.001)
    assert found.low_RM[0, 1] == 0 and found.high_RM[0, 1] > 2 * found.mean_RM[0, 1]
    flipped = intervals(-scores[None])
    assert flipped.high_RM[0, 1] == 0
