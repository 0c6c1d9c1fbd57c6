"""Scores as arm + seed + residual: least squares, and whether all arms have one deviation."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

_DRAWS = 4000


@dataclasses.dataclass(frozen=True)
class Additive:
    """The fitted model; arm 0 is the baseline.

    `effects` [A - 1]: every other arm minus the baseline. `covariance` [A - 1, A - 1]: of
    `effects`, in units of the residuals' variance. `deviation`: of one residual. `degrees`: of
    freedom of `deviation`. `homogeneity_p`: of the hypothesis that residuals of all arms have one
    variance; None for two arms, whose residuals mirror each other.
    """

    effects: np.ndarray
    covariance: np.ndarray
    deviation: float
    degrees: int
    homogeneity_p: float | None


def fit(scores_AS: np.ndarray) -> Additive:
    """Fits score = arm + seed + residual by least squares.

    Args:
      scores_AS: float64 [arms, seeds], NaN where a run is missing; the baseline is row 0 and every
        arm shares seeds with it.
    """
    present = np.isfinite(scores_AS)
    design = _design(present.shape, present.tobytes())
    values = scores_AS[present]
    centred = values - values.mean()
    arms = present.shape[0]
    effects = (design.solve @ centred)[: arms - 1]
    residuals = design.project @ centred
    degrees = design.degrees
    total = float(residuals @ residuals)
    # Rounding leaves residuals where the scores fit exactly.
    if total <= (1e-13 * float(np.abs(values).max())) ** 2 * len(values):
        total, effects = 0.0, np.where(np.abs(effects) < 1e-12 * np.abs(values).max(), 0, effects)
    deviation = np.sqrt(total / degrees) if degrees else np.nan
    p = None
    if arms > 2 and total > 0:
        null = _null(present.shape, present.tobytes())
        found = float(_statistic(residuals[None], design)[0])
        p = float((1 + (null >= found - 1e-12).sum()) / (1 + len(null)))
    return Additive(effects, design.covariance, float(deviation), degrees, p)


@dataclasses.dataclass(frozen=True)
class _Design:
    """Matrices that depend on which runs exist alone; N scores, A arms."""

    solve: np.ndarray  # [parameters, N]
    project: np.ndarray  # [N, N], onto residuals
    covariance: np.ndarray
    degrees: int
    members: np.ndarray  # [N, A], which arm a score belongs to
    freedom: np.ndarray  # [A], share of the degrees of freedom that an arm's residuals have


@functools.lru_cache(64)
def _design(shape: tuple[int, int], present: bytes) -> _Design:
    arm, seed = np.nonzero(np.frombuffer(present, bool).reshape(shape))
    arms, seeds = shape
    members = (arm[:, None] == np.arange(arms)).astype(float)
    matrix = np.concatenate([members[:, 1:], seed[:, None] == np.arange(seeds)], axis=1)
    solve = np.linalg.pinv(matrix)
    project = np.eye(len(arm)) - matrix @ solve
    covariance = (solve @ solve.T)[: arms - 1, : arms - 1]
    degrees = len(arm) - int(np.linalg.matrix_rank(matrix))
    freedom = members.T @ np.diag(project)
    return _Design(solve, project, covariance, degrees, members, freedom)


def _statistic(residuals_RN: np.ndarray, design: _Design) -> np.ndarray:
    """Bartlett's statistic of the residuals' variances by arm, one value for each row."""
    squares = residuals_RN**2 @ design.members
    freedom = design.freedom
    variances = np.maximum(squares / freedom, 1e-30 * squares.max(axis=1, keepdims=True))
    pooled = squares.sum(axis=1) / freedom.sum()
    return freedom.sum() * np.log(pooled) - np.log(variances) @ freedom


@functools.lru_cache(64)
def _null(shape: tuple[int, int], present: bytes) -> np.ndarray:
    """The statistic's values under equal variances, simulated: arms share their seeds' errors."""
    design = _design(shape, present)
    draws = np.random.default_rng(0).normal(size=(_DRAWS, len(design.project)))
    return _statistic(draws @ design.project, design)
