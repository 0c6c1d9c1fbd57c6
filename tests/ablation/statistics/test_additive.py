"""The additive model is the textbook's, and its test of equal deviations keeps its level."""

import numpy as np
import pytest

from lightning_jax.ablation.statistics import additive

GENERATOR = np.random.default_rng(0)
COMPLETE = np.ones((4, 5), bool)
GAPS = COMPLETE.copy()
GAPS[0, 2] = GAPS[1, 0] = GAPS[3, 3:] = False


def simulate(present, replicates, deviations=(1, 1, 1, 1)):
    shape = (replicates, *present.shape)
    scores = GENERATOR.normal(size=shape) * np.array(deviations)[:, None]
    scores += 20 * GENERATOR.standard_t(1, size=(replicates, 1, present.shape[1]))
    return np.where(present, scores, np.nan)


def test_complete_grid_is_the_paired_mean_and_the_interaction():
    scores = simulate(COMPLETE, 3)
    found = additive.fit(scores)
    np.testing.assert_allclose(found.effects_RM, (scores[:, 1:] - scores[:, :1]).mean(2))
    residuals = scores - scores.mean(1, keepdims=True) - scores.mean(2, keepdims=True)
    residuals += scores.mean((1, 2), keepdims=True)
    assert found.degrees == 12
    np.testing.assert_allclose(found.variance_R, (residuals**2).sum((1, 2)) / 12)
    np.testing.assert_allclose(found.covariance_MM, (np.eye(3) + 1) / 5)


def test_gaps_are_fitted_by_least_squares():
    scores = simulate(GAPS, 1)
    arm, seed = np.nonzero(GAPS)
    columns = [arm == index for index in range(4)] + [seed == index for index in range(1, 5)]
    matrix = np.stack(columns, axis=1).astype(float)
    solution, squares, rank, _ = np.linalg.lstsq(matrix, scores[0][GAPS], rcond=None)
    found = additive.fit(scores)
    np.testing.assert_allclose(found.effects_RM[0], solution[1:4] - solution[0], atol=1e-9)
    assert found.degrees == len(arm) - rank
    assert found.variance_R[0] == pytest.approx(squares.item() / found.degrees)


def test_effects_and_variances_are_unbiased_with_gaps():
    found = additive.fit(simulate(GAPS, 4000) + np.array([0, 1, 2, 3])[:, None])
    np.testing.assert_allclose(found.effects_RM.mean(0), [1, 2, 3], atol=0.06)
    np.testing.assert_allclose(np.cov(found.effects_RM.T), found.covariance_MM, atol=0.06)
    assert found.variance_R.mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("present", [COMPLETE, GAPS], ids=["complete", "gaps"])
def test_equal_deviations_are_rejected_at_their_rate(present):
    p = additive.homogeneity_p(simulate(present, 4000))
    for level in (0.05, 0.1, 0.5):
        assert (p < level).mean() == pytest.approx(level, abs=0.035)


@pytest.mark.parametrize("noisy", [0, 3], ids=["baseline", "arm"])
@pytest.mark.parametrize("arms", [3, 4])
def test_a_noisy_arm_is_noticed(arms, noisy):
    deviations = np.where(np.arange(arms) == noisy % arms, 6, 1)
    p = additive.homogeneity_p(simulate(np.ones((arms, 10), bool), 500, deviations))
    assert (p < 0.05).mean() > 0.95


def test_two_arms_cannot_be_told_apart_by_deviation():
    assert additive.homogeneity_p(simulate(COMPLETE[:2], 1, (1, 1))) is None


def test_rounding_is_no_residual():
    seeds = np.array([2.0, 2.1, 1.9])
    scores = (seeds + np.array([0, 0.5, 0.1])[:, None])[None]
    assert additive.fit(scores).variance_R[0] == 0
    assert additive.homogeneity_p(scores)[0] == 1


def test_grid_and_common_seeds():
    scores = {"a": {3: 1.0, 1: 2.0}, "b": {1: 4.0, 0: 5.0}}
    assert additive.common_seeds(scores, "a", "b") == (1,)
    expected = [[[np.nan, 2, 1], [5, 4, np.nan]]]
    np.testing.assert_array_equal(additive.grid(scores, ["a", "b"]), expected)
