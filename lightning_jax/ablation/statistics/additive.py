"""Scores as arm + seed + residual: least squares, and whether all arms have one deviation.

Letters: R replicates (1, or more in simulations), A arms (the baseline first), M = A - 1 arms that
are compared with it, S seeds, N runs that have a score.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

# By arm and seed; a run without a result is left out.
Scores = Mapping[str, Mapping[int, float]]

_DRAWS = 1000
# Differences of scores below this share of a score are rounding.
ROUNDING = 1e-13


@dataclasses.dataclass(frozen=True)
class Additive:
    """The fitted model.

    `effects_RM`: arms minus the baseline. `covariance_MM`: of the effects, in units of the
    residuals' variance. `variance_R`: of a residual. `degrees`: of freedom of `variance_R`.
    """

    effects_RM: np.ndarray
    covariance_MM: np.ndarray
    variance_R: np.ndarray
    degrees: int


def common_seeds(scores: Scores, arm: str, baseline: str) -> tuple[int, ...]:
    """Seeds with which both arms have a score, in order."""
    return tuple(sorted(set(scores[arm]) & set(scores[baseline])))


def grid(scores: Scores, arms: Sequence[str]) -> np.ndarray:
    """Scores as one replicate [1, A, S], float64, NaN where a run is missing."""
    seeds = sorted({seed for arm in arms for seed in scores[arm]})
    return np.array([[[scores[arm].get(seed, np.nan) for seed in seeds] for arm in arms]], float)


def fit(scores_RAS: np.ndarray) -> Additive:
    """Fits score = arm + seed + residual by least squares.

    Args:
      scores_RAS: float64, NaN where a run is missing (in all replicates alike). Every arm shares a
        seed with the baseline. Where none shares two, the variance is NaN.
    """
    present_AS = np.isfinite(scores_RAS[0])
    arms, seeds = present_AS.shape
    # The baseline has no column of its own: the others' parameters are differences to it. Centred
    # within seeds, scores and columns need no parameters for the seeds.
    is_arm_MAS = np.broadcast_to(np.eye(arms)[1:, :, None], (arms - 1, arms, seeds))
    columns_MN = _within_seeds(np.where(present_AS, is_arm_MAS, np.nan), present_AS)
    scores_RN = _within_seeds(scores_RAS, present_AS)
    covariance_MM = np.linalg.inv(columns_MN @ columns_MN.T)
    effects_RM = scores_RN @ columns_MN.T @ covariance_MM
    residuals_RN = scores_RN - effects_RM @ columns_MN
    for exact in (residuals_RN, effects_RM):
        exact[np.abs(exact) < ROUNDING * np.nanmax(np.abs(scores_RAS))] = 0
    degrees = int(present_AS.sum()) - seeds - (arms - 1)
    return Additive(
        effects_RM=effects_RM,
        covariance_MM=covariance_MM,
        variance_R=(residuals_RN**2).sum(axis=1) / (degrees or np.nan),
        degrees=degrees,
    )


def _within_seeds(values_RAS: np.ndarray, present_AS: np.ndarray) -> np.ndarray:
    """Values [R, N] less the mean of their seed over the arms that have it."""
    return (values_RAS - np.nanmean(values_RAS, axis=1, keepdims=True))[:, present_AS]


def homogeneity_p(scores_RAS: np.ndarray) -> np.ndarray | None:
    """p-value [R] of the hypothesis that the residuals of all arms have one variance.

    The variance of a paired difference is the sum of two arms' variances, so the differences of
    all pairs give each arm's own (Grubbs, JASA 43, 1948). The statistic is the largest of them,
    relative to their mean. Its distribution under equal variances is simulated for the grid.

    Args:
      scores_RAS: as for `fit`; every arm shares two seeds with the baseline.

    Returns:
      The p-values; None for two arms, which one difference cannot tell apart.
    """
    present_AS = np.isfinite(scores_RAS[0])
    if len(present_AS) < 3:
        return None
    null = _null(present_AS.shape, present_AS.tobytes())
    found_R = _largest_share(scores_RAS, present_AS)
    return (1 + len(null) - np.searchsorted(null, found_R)) / (1 + len(null))


def _largest_share(scores_RAS: np.ndarray, present_AS: np.ndarray) -> np.ndarray:
    """Largest variance of an arm relative to the mean variance [R]; 1 without any."""
    arms = len(present_AS)
    pairs, variances = [], []
    for one, other in itertools.combinations(range(arms), 2):
        both = np.nonzero(present_AS[one] & present_AS[other])[0]
        if len(both) > 1:
            changes_RS = scores_RAS[:, one, both] - scores_RAS[:, other, both]
            pairs.append(np.isin(np.arange(arms), (one, other)))
            variances.append(changes_RS.var(axis=1, ddof=1))
    own_AR = np.linalg.pinv(np.array(pairs, float)) @ np.array(variances)
    mean_R = own_AR.mean(axis=0)
    some_R = mean_R > (ROUNDING * np.nanmax(np.abs(scores_RAS))) ** 2
    return np.where(some_R, own_AR.max(axis=0) / np.where(some_R, mean_R, 1), 1)


@functools.lru_cache(256)
def _null(shape: tuple[int, int], present: bytes) -> np.ndarray:
    """Simulated values of the statistic under equal variances, sorted."""
    draws_RAS = np.random.default_rng(0).normal(size=(_DRAWS, *shape))
    return np.sort(_largest_share(draws_RAS, np.frombuffer(present, bool).reshape(shape)))
