"""How many seeds decide a margin: the power of a sweep's verdicts, and the number for a power."""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from lightning_jax.ablation import dunnett
from lightning_jax.config.fields import require

_PILOT_NODES = 40


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
    it is at least the margin, and any of the two in between. The mean of n differences is normal
    and its estimated deviation chi, so the probability is an integral over the latter.

    Args:
      seeds: of every arm, at least 2.
      deviation: standard deviation of one paired difference (arm minus baseline, same seed).
      margin: difference that matters, above 0, in the unit of `deviation`.
      arms: compared with the baseline (which does not count).
      true_difference: assumed, in the same unit.
      pilot_degrees: degrees of freedom of `deviation`, where a pilot estimated it. The power is
        then the mean over what the true deviation may be (`deviation`^2 degrees / chi-squared).
        None: `deviation` is exact.
      confidence: that all intervals hold together.
      pooled: whether residuals are pooled over arms (Dunnett); else every arm has its own
        deviation (Bonferroni).

    Raises:
      UserError: an argument out of its range.
    """
    _check(deviation, margin, arms, confidence)
    require(seeds >= 2, "seeds", seeds, "at least 2")
    if pooled:
        degrees = arms * (seeds - 1)
        critical = dunnett.critical_value(arms, degrees, confidence)
    else:
        degrees = seeds - 1
        critical = float(stats.t.ppf(1 - (1 - confidence) / (2 * arms), degrees))
    true, weights = np.array([deviation]), np.array([1.0])
    if pilot_degrees is not None:
        require(pilot_degrees >= 1, "pilot_degrees", pilot_degrees, "at least 1")
        scale, weights = dunnett.scale_nodes(pilot_degrees, _PILOT_NODES)
        true = deviation / scale
    estimate, estimate_weights = dunnett.scale_nodes(degrees)
    error = np.maximum(true, 1e-300)[:, None] / np.sqrt(seeds)
    half = critical * estimate * error
    right = _right(abs(true_difference), margin, half, error)
    return float(np.clip(weights @ right @ estimate_weights, 0, 1))


def _check(deviation: float, margin: float, arms: int, confidence: float) -> None:
    require(np.isfinite(deviation) and deviation >= 0, "deviation", deviation, "a number >= 0")
    require(np.isfinite(margin) and margin > 0, "margin", margin, "a number above 0")
    require(arms >= 1, "arms", arms, "at least 1")
    require(0.5 <= confidence < 1, "confidence", confidence, "in [0.5, 1)")


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
    most: int = 200,
    confidence: float = 0.95,
    pooled: bool = True,
    least: int = 2,
) -> int | None:
    """Smallest number of seeds (of every arm, from `least` on) whose power reaches `power`.

    With `true_difference` 0 that many seeds show that an arm is equivalent to the baseline; they
    then find a difference as large as the margin at least as often.

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
        return (
            _power(
                seeds,
                deviation,
                margin,
                arms=arms,
                true_difference=true_difference,
                pilot_degrees=pilot_degrees,
                confidence=confidence,
                pooled=pooled,
            )
            >= power
        )

    if least > most or not enough(most):
        return None
    low, high = least - 1, most  # the answer is in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


_power = power
