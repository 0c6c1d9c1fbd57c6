"""How many seeds decide a margin: the power of a sweep's verdicts, and the number for a power."""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import special, stats

from lightning_jax.ablation.statistics import dunnett
from lightning_jax.ablation.statistics.intervals import intervals
from lightning_jax.config.fields import require

MOST_SEEDS = 200
_PILOT_NODES = 32
_NUMBERS = 250_000  # of a simulation
_LEAST_DRAWS, _MOST_DRAWS = 300, 2000


def power(
    seeds: int,
    deviation: float,
    margin: float,
    *,
    arms: int,
    true_difference: float = 0.0,
    pilot_degrees: int | None = None,
    confidence: float = 0.95,
    pooled: bool = True,
) -> float:
    """Probability that `statistics.compare` gives one arm the verdict that is right.

    Right is "equivalent" where the true difference is 0, "better" or "worse" (by its sign) where
    it is at least the margin, and either of the two in between. The mean of the differences is
    normal and independent of the width of its interval. So the probability is the normal one,
    averaged over widths: those of the very intervals of `compare`, simulated under equal deviations
    of all arms, or without pooling Bonferroni's.

    Args:
      seeds: of every arm, at least 2.
      deviation: standard deviation of one paired difference (arm minus baseline, same seed).
      margin: difference that matters, above 0, in the unit of `deviation`.
      arms: compared with the baseline (which does not count).
      true_difference: assumed, in the same unit.
      pilot_degrees: degrees of freedom of `deviation`, where a pilot estimated it. The power is
        then the mean over what the true deviation may be, deviation^2 * degrees / chi-squared.
        None: `deviation` is exact.
      confidence: that all intervals hold together.
      pooled: False where arms are known to have deviations of their own (`deviation` is one arm's).

    Raises:
      UserError: an argument out of its range.
    """
    require(math.isfinite(deviation) and deviation >= 0, "deviation", deviation, "0 or above")
    require(math.isfinite(margin) and margin > 0, "margin", margin, "a number above 0")
    require(math.isfinite(true_difference), "true_difference", true_difference, "finite")
    require(arms >= 1, "arms", arms, "at least 1")
    require(seeds >= 2, "seeds", seeds, "at least 2")
    require(0.5 <= confidence < 1, "confidence", confidence, "in [0.5, 1)")
    deviations, weights = np.array([deviation]), np.array([1.0])
    if pilot_degrees is not None:
        require(pilot_degrees >= 1, "pilot_degrees", pilot_degrees, "at least 1")
        scale, weights = dunnett.scale_nodes(pilot_degrees, _PILOT_NODES)
        deviations = deviation / scale
    # No deviation at all is a verdict without errors.
    errors = np.maximum(deviations / math.sqrt(seeds), 1e-12 * margin)
    half = _relative_widths(arms, seeds, confidence, pooled) * errors[:, None]
    right = _right(abs(true_difference), margin, half, errors[:, None])
    return float(weights @ right.mean(axis=1))


@functools.lru_cache(256)
def _relative_widths(arms: int, seeds: int, confidence: float, pooled: bool) -> np.ndarray:
    """Half widths of intervals in units of the true standard error, equally probable."""
    if not pooled:
        critical = stats.t.ppf(1 - (1 - confidence) / (2 * arms), seeds - 1)
        ranks = (np.arange(_MOST_DRAWS) + 0.5) / _MOST_DRAWS
        return critical * np.sqrt(stats.chi2.ppf(ranks, seeds - 1) / (seeds - 1))
    # Many seeds estimate the deviation well, and need fewer draws.
    draws = min(max(_NUMBERS // ((arms + 1) * seeds), _LEAST_DRAWS), _MOST_DRAWS)
    scores_RAS = np.random.default_rng(1).normal(size=(draws, arms + 1, seeds))
    found = intervals(scores_RAS, confidence)
    # Holm's intervals may end at 0; the far end is always Bonferroni's.
    half = np.maximum(found.high_RM - found.mean_RM, found.mean_RM - found.low_RM)
    return np.sort(half.ravel())[arms // 2 :: arms] / math.sqrt(2 / seeds)


def _right(true: float, margin: float, half: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Probability of a right verdict, given the half width of the interval."""

    def below(value: np.ndarray) -> np.ndarray:
        return special.ndtr((value - true) / error)

    room = margin - half  # what the mean's distance from 0 must stay below, to be equivalent
    if true >= margin:
        return 1 - below(np.maximum(half, room))
    equivalent = np.where(room > 0, below(room) - below(-room), 0.0)
    if true == 0:
        return equivalent
    return np.where(room > half, 1 - below(-room), equivalent + 1 - below(half))


def seeds_needed(
    deviation: float,
    margin: float,
    *,
    arms: int,
    power: float = 0.8,
    true_difference: float = 0.0,
    pilot_degrees: int | None = None,
    most: int = MOST_SEEDS,
    confidence: float = 0.95,
    pooled: bool = True,
    least: int = 2,
) -> int | None:
    """Smallest number of seeds (of every arm, from `least` on) whose power reaches `power`.

    With `true_difference` 0, so many seeds show that an arm without effect is equivalent to the
    baseline; a difference as large as the margin is then found at least as often.

    Args:
      power: probability of a right verdict, in (0, 1).
      most: largest number that is of interest.
      Others: as for the function `power`.

    Returns:
      The number, or None where it is above `most`.

    Raises:
      UserError: an argument out of its range.
    """
    require(0 < power < 1, "power", power, "in (0, 1)")
    require(least >= 2, "least", least, "at least 2")

    def enough(seeds: int) -> bool:
        return power <= _power(
            seeds,
            deviation,
            margin,
            arms=arms,
            true_difference=true_difference,
            pilot_degrees=pilot_degrees,
            confidence=confidence,
            pooled=pooled,
        )

    if least > most:
        return None
    low, high = least - 1, least  # the answer is above `low`
    while not enough(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


_power = power  # the name of an argument of `seeds_needed` too
