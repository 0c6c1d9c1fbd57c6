"""Intervals of the differences to a baseline that hold together, by arm.

Letters as in `statistics.additive`: R replicates, A arms (the baseline first), M = A - 1 arms that
are compared with it, S seeds.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import stats

from lightning_jax.ablation.statistics import additive, dunnett

# Residuals are pooled where the hypothesis of equal deviations has at least this p-value.
POOLING_P = 0.1


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Differences to the baseline, arm minus baseline, and intervals that hold together.

    `mean_RM`, its standard `error_RM`, `low_RM` and `high_RM`; the `deviation_RM` of one paired
    difference that the interval uses and its `degrees_RM` of freedom. `pooled_R`: whether the
    residuals of all arms estimate one deviation, `pooled_deviation_R`; `homogeneity_p_R` of the
    test of that (None for a single arm). `correlation`: of two arms' means, where pooled.
    """

    mean_RM: np.ndarray
    error_RM: np.ndarray
    low_RM: np.ndarray
    high_RM: np.ndarray
    deviation_RM: np.ndarray
    degrees_RM: np.ndarray
    pooled_R: np.ndarray
    pooled_deviation_R: np.ndarray
    homogeneity_p_R: np.ndarray | None
    correlation: float

    def p_M(self, replicate: int = 0) -> np.ndarray:
        """Two-sided p-values of no difference, adjusted for the family: Dunnett's or Holm's."""
        statistic_M = _ratio(np.abs(self.mean_RM[replicate]), self.error_RM[replicate])
        if self.pooled_R[replicate]:
            return np.array([self._one_step_p(value, 0, replicate) for value in statistic_M])
        return _holm(2 * stats.t.sf(statistic_M, self.degrees_RM[replicate]))

    def equivalence_p(self, margin: float, arm: int, replicate: int = 0) -> float:
        """Adjusted p-value of a difference of `margin` or more, two one-sided tests in one."""
        room = margin - np.abs(self.mean_RM[replicate, arm])
        return self._one_step_p(_ratio(room, self.error_RM[replicate, arm]).item(), arm, replicate)

    def _one_step_p(self, statistic: float, arm: int, replicate: int = 0) -> float:
        """Adjusted p-value of a t statistic of one arm: that of its interval, read backwards."""
        if statistic <= 0:
            return 1.0
        count, degrees = self.mean_RM.shape[1], int(self.degrees_RM[replicate, arm])
        if self.pooled_R[replicate]:
            return dunnett.tail(statistic, count, degrees, self.correlation)
        return min(1.0, count * 2 * float(stats.t.sf(statistic, degrees)))


def intervals(scores_RAS: np.ndarray, confidence: float = 0.95) -> Intervals:
    """Estimates differences to the baseline with intervals that hold together.

    Scores are arm + seed + residual. Where the residuals' variances do not differ by arm
    (`additive.homogeneity_p` is at least `POOLING_P`), all residuals estimate one deviation, a grid
    with gaps is fitted by least squares, and the intervals are Dunnett's. A few seeds cannot show
    that one arm is noisier. So no interval is narrower than with the deviation of the arm's own
    paired differences, or the mean of all arms' (which a noisy baseline raises), in place of the
    pooled one.

    Otherwise every arm has Student's t of its own paired differences, and the intervals are those
    that belong to Holm's procedure (Guilbaud, Biometrical Journal 50, 2008): Bonferroni's, but one
    that Holm finds different from 0 ends at 0.

    Args:
      scores_RAS: float64, NaN where a run is missing (in all replicates alike); every arm shares
        at least two seeds with the baseline.
      confidence: that all M intervals hold together.
    """
    fitted = additive.fit(scores_RAS)
    changes_RMS = scores_RAS[:, 1:] - scores_RAS[:, :1]
    seeds_M = np.isfinite(changes_RMS[0]).sum(axis=1)
    own_RM = np.nanvar(changes_RMS, axis=2, ddof=1)
    own_RM[own_RM < (additive.ROUNDING * np.nanmax(np.abs(scores_RAS))) ** 2] = 0
    p_R = additive.homogeneity_p(scores_RAS)
    pooled_R = np.ones(len(scores_RAS), bool) if p_R is None else p_R >= POOLING_P
    pooled_R1 = pooled_R[:, None]

    count = len(seeds_M)
    mean_of_own_R = own_RM @ (seeds_M - 1) / (seeds_M - 1).sum()
    least_R1 = np.maximum(2 * fitted.variance_R, mean_of_own_R)[:, None]
    variance_RM = np.where(pooled_R1, np.maximum(least_R1, own_RM), own_RM)
    share_M = np.diag(fitted.covariance_MM) / 2
    error_RM = np.sqrt(variance_RM * np.where(pooled_R1, share_M, 1 / seeds_M))
    mean_RM = np.where(pooled_R1, fitted.effects_RM, np.nanmean(changes_RMS, axis=2))

    correlation = _correlation(fitted.covariance_MM)
    dunnetts = dunnett.critical_value(count, fitted.degrees, confidence, correlation)
    bonferronis_M = stats.t.ppf(1 - (1 - confidence) / (2 * count), seeds_M - 1)
    half_RM = np.where(pooled_R1, dunnetts, bonferronis_M) * error_RM
    low_RM, high_RM = mean_RM - half_RM, mean_RM + half_RM
    holms_RM = _holm(2 * stats.t.sf(_ratio(np.abs(mean_RM), error_RM), seeds_M - 1))
    ends_RM = ~pooled_R1 & (holms_RM <= 1 - confidence)
    return Intervals(
        mean_RM=mean_RM,
        error_RM=error_RM,
        low_RM=np.where(ends_RM & (mean_RM > 0), np.maximum(low_RM, 0), low_RM),
        high_RM=np.where(ends_RM & (mean_RM < 0), np.minimum(high_RM, 0), high_RM),
        deviation_RM=np.sqrt(variance_RM),
        degrees_RM=np.where(pooled_R1, fitted.degrees, seeds_M - 1),
        pooled_R=pooled_R,
        pooled_deviation_R=np.sqrt(2 * fitted.variance_R),
        homogeneity_p_R=p_R,
        correlation=correlation,
    )


def _correlation(covariance_MM: np.ndarray) -> float:
    """Of two arms' means: 1/2, or with gaps the least of all, which gives the widest intervals."""
    deviation_M = np.sqrt(np.diag(covariance_MM))
    correlation_MM = covariance_MM / np.outer(deviation_M, deviation_M)
    return round(float(np.clip(correlation_MM.min(), 0, 0.5)), 6)


def _holm(p_RM: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p_RM, axis=-1)
    steps = np.arange(p_RM.shape[-1], 0, -1)
    sorted_p = np.take_along_axis(p_RM, order, axis=-1)
    adjusted = np.minimum(1, np.maximum.accumulate(steps * sorted_p, axis=-1))
    return np.take_along_axis(adjusted, np.argsort(order, axis=-1), axis=-1)


def _ratio(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """t statistics; runs that repeat each other exactly have no error."""
    value, error = np.broadcast_arrays(value, error)
    without = np.where(value == 0, 0.0, np.copysign(np.inf, value))
    return np.where(error > 0, value / np.where(error > 0, error, 1), without)
