"""Dunnett's distribution: the largest of several t statistics that share one baseline.

C. W. Dunnett, "A Multiple Comparison Procedure for Comparing Several Treatments with a Control",
JASA 50 (1955). All statistics share the estimate of the deviation, and have equal correlation: 1/2
where every arm has as many runs as the baseline.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import optimize, special, stats

_NODES = 80
_legendre = functools.cache(np.polynomial.legendre.leggauss)


@functools.cache
def scale_nodes(degrees: int, nodes: int = _NODES) -> tuple[np.ndarray, np.ndarray]:
    """Quadrature over s / sigma, the estimated deviation relative to the true deviation.

    Returns values and weights (they sum to 1), by Gauss-Legendre in the probability of
    degrees * (s / sigma)^2, which is chi-squared(degrees).
    """
    points, weights = _legendre(nodes)
    # A power of the probability puts more nodes at small s, where large statistics come from.
    base = (points + 1) / 2
    scale = np.sqrt(stats.chi2.ppf(base**4, degrees) / degrees)
    return scale, weights / 2 * 4 * base**3


@functools.cache
def _shared_nodes() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Hermite over what the statistics have in common, a standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return points, weights / weights.sum()


def tail(statistic: float, count: int, degrees: int, correlation: float = 0.5) -> float:
    """Probability that the largest of `count` absolute t statistics exceeds `statistic`.

    Args:
      statistic: at least 0; infinity gives 0.
      count: statistics in the family.
      degrees: of freedom of the estimated deviation.
      correlation: of every two statistics, from 0 up to 1 (excluded).
    """
    if not np.isfinite(statistic):
        return 0.0
    scale, scale_weights = scale_nodes(degrees)
    shared, shared_weights = _shared_nodes()
    own = np.sqrt(1 - correlation)
    centre, reach = np.sqrt(correlation) * shared, statistic * scale[:, None]
    inside = special.ndtr((centre + reach) / own) - special.ndtr((centre - reach) / own)
    return float(np.clip(scale_weights @ (1 - inside**count) @ shared_weights, 0, 1))


@functools.cache
def critical_value(
    count: int, degrees: int, confidence: float = 0.95, correlation: float = 0.5
) -> float:
    """Half width, in standard errors, of two-sided intervals that hold all together."""
    low = float(stats.t.ppf((1 + confidence) / 2, degrees))
    if count == 1:
        return low
    high = stats.t.ppf(1 - (1 - confidence) / (2 * count), degrees)  # Bonferroni

    def excess(statistic: float) -> float:
        return tail(statistic, count, degrees, correlation) - (1 - confidence)

    found = optimize.root_scalar(excess, bracket=(0.99 * low, 1.01 * high), xtol=1e-7)
    return float(found.root)
