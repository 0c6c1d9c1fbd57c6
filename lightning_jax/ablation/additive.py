"""Scores as arm + seed + residual: least squares, and whether all arms have one deviation.

Letters: R replicates (1, or more in simulations), A arms (the baseline first), M = A - 1 arms that
are compared with it, S seeds, N runs that have a score, P parameters of the model.
"""

from __future__ import annotations

import dataclasses
import functools
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
    `homogeneity_p_R`: of the hypothesis that the residuals of all arms have one variance; None for
    a single arm and the baseline, whose residuals mirror each other.
    """

    effects_RM: np.ndarray
    covariance_MM: np.ndarray
    variance_R: np.ndarray
    degrees: int
    homogeneity_p_R: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class _Design:
    """What depends on the grid of runs alone."""

    matrix_NP: np.ndarray
    solve_PN: np.ndarray
    degrees: int
    members_NA: np.ndarray  # 1 where a run belongs to an arm
    freedom_A: np.ndarray  # the degrees of freedom of every arm's residuals; their sum is `degrees`

    def residuals(self, scores_RN: np.ndarray) -> np.ndarray:
        return scores_RN - (scores_RN @ self.solve_PN.T) @ self.matrix_NP.T


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
    key = present_AS.shape, present_AS.tobytes()
    design = _design(*key)
    arms = len(present_AS)
    scores_RN = scores_RAS[:, present_AS]
    # The mean is of no consequence for differences, and rounds.
    scores_RN = scores_RN - scores_RN.mean(axis=1, keepdims=True)
    residuals_RN = design.residuals(scores_RN)
    residuals_RN[np.abs(residuals_RN) < ROUNDING * np.nanmax(np.abs(scores_RAS))] = 0
    p_R = None
    if arms > 2 and design.degrees:
        null = _null(*key)
        above = len(null) - np.searchsorted(null, _statistic(residuals_RN, design))
        p_R = (1 + above) / (1 + len(null))
    return Additive(
        effects_RM=scores_RN @ design.solve_PN[: arms - 1].T,
        covariance_MM=(design.solve_PN @ design.solve_PN.T)[: arms - 1, : arms - 1],
        variance_R=(residuals_RN**2).sum(axis=1) / (design.degrees or np.nan),
        degrees=design.degrees,
        homogeneity_p_R=p_R,
    )


@functools.lru_cache(256)
def _design(shape: tuple[int, int], present: bytes) -> _Design:
    arms, seeds = shape
    arm_N, seed_N = np.nonzero(np.frombuffer(present, bool).reshape(shape))
    members_NA = (arm_N[:, None] == np.arange(arms)).astype(float)
    # The baseline has no column of its own: the others' parameters are differences to it.
    matrix_NP = np.concatenate([members_NA[:, 1:], seed_N[:, None] == np.arange(seeds)], axis=1)
    # Normal equations: the columns are 0 and 1, and far from dependent.
    solve_PN = np.linalg.solve(matrix_NP.T @ matrix_NP, matrix_NP.T)
    left_N = 1 - np.einsum("np,pn->n", matrix_NP, solve_PN)
    return _Design(
        matrix_NP, solve_PN, round(left_N.sum()), members_NA, freedom_A=left_N @ members_NA
    )


def _statistic(residuals_RN: np.ndarray, design: _Design) -> np.ndarray:
    """Bartlett's statistic [R] of the residuals' variances by arm; 0 without residuals."""
    freedom_A = design.freedom_A
    squares_RA = residuals_RN**2 @ design.members_NA
    variance_RA = squares_RA / freedom_A
    pooled_R1 = squares_RA.sum(axis=1, keepdims=True) / freedom_A.sum()
    shares_RA = np.where(pooled_R1 > 0, variance_RA / np.where(pooled_R1 > 0, pooled_R1, 1), 1)
    # The log of a variance of 0 (an arm that repeats another) would be infinite.
    return -np.log(np.maximum(shares_RA, 1e-12)) @ freedom_A


@functools.lru_cache(256)
def _null(shape: tuple[int, int], present: bytes) -> np.ndarray:
    """Simulated values of the statistic under equal variances, sorted.

    Residuals of one seed sum to 0 over arms, so Bartlett's chi-squared would not be right.
    """
    design = _design(shape, present)
    draws_RN = np.random.default_rng(0).normal(size=(_DRAWS, len(design.matrix_NP)))
    return np.sort(_statistic(design.residuals(draws_RN), design))
