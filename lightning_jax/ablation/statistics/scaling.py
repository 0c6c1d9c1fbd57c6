"""Compute-equivalent gain: how much more compute the baseline needs for an arm's loss.

The baseline is trained at several budgets. Its loss over training FLOPs C follows
L = E + exp(a) C^-slope (Kaplan et al. 2020, arXiv 2001.08361; with a floor E, Hoffmann et al. 2022,
arXiv 2203.15556). An arm that reaches its loss with C FLOPs, where the baseline needs g C, has a
gain of g.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy import optimize, stats

from lightning_jax.config.fields import require

_BUDGETS_FOR_FLOOR = 3
# Of the least loss: nearer to it a power law is too steep to read a budget from.
_HIGHEST_FLOOR = 0.95


@dataclasses.dataclass(frozen=True)
class Fit:
    """The baseline's loss over training FLOPs: loss = floor + exp(intercept) FLOPs^-slope.

    `intercepts` and `slopes` are by seed, the floor is shared. `least` and `most` are the smallest
    and the largest budget, in FLOPs.
    """

    floor: float
    intercepts: dict[int, float]
    slopes: dict[int, float]
    least: float
    most: float


@dataclasses.dataclass(frozen=True)
class Gain:
    """Compute-equivalent gain of one arm over the baseline.

    `value`: the baseline needs `value` times the arm's FLOPs to reach the arm's loss, so above 1
    the arm is the better one. None where the fitted baseline never reaches that loss. `low` and
    `high`: a 95% interval over seeds; None with fewer than two common seeds, or where the seeds
    leave open whether the baseline gains from compute at all. `extrapolated`: the equivalent
    budget lies outside of those at which the baseline was trained. `seeds`: those in common.
    """

    value: float | None
    low: float | None
    high: float | None
    extrapolated: bool
    seeds: tuple[int, ...]


def fit(losses: Mapping[float, Mapping[int, float]]) -> Fit:
    """Fits a power law to the baseline's losses, seed by seed.

    Three budgets or more have a common floor, the one with the least squares of the logarithms of
    the mean losses above it; two budgets have none. Seeds without all budgets are left out.

    Args:
      losses: by training FLOPs and seed, all above 0.

    Raises:
      UserError: fewer than two budgets, no seed with all of them, or a number that is not above 0.
    """
    require(len(losses) >= 2, "losses", sorted(losses), "at two budgets or more")
    seeds = sorted(set.intersection(*[set(of_budget) for of_budget in losses.values()]))
    require(bool(seeds), "losses", sorted(losses), "of one seed at all budgets, or more")
    flops_B = np.array(sorted(losses), float)
    loss_BS = np.array([[losses[flops][seed] for seed in seeds] for flops in flops_B])
    for name, values in (("FLOPs", flops_B), ("losses", loss_BS)):
        require(bool((values > 0).all()), name, float(values.min()), "above 0")
    floor = _floor(flops_B, loss_BS) if len(flops_B) >= _BUDGETS_FOR_FLOOR else 0.0
    (slopes, intercepts), _ = _lines(flops_B, loss_BS, floor)
    return Fit(
        floor=floor,
        intercepts=dict(zip(seeds, intercepts.tolist(), strict=True)),
        slopes=dict(zip(seeds, (-slopes).tolist(), strict=True)),
        least=flops_B[0].item(),
        most=flops_B[-1].item(),
    )


def _lines(flops_B: np.ndarray, loss_BS: np.ndarray, floor: float) -> tuple[np.ndarray, float]:
    """Straight lines through the logarithms [2, S], and the sum of squares that is left."""
    x, y = np.log(flops_B), np.log(loss_BS - floor)
    lines = np.polyfit(x, y, 1)
    left = y - (lines[0] * x[:, None] + lines[1])
    return lines, float((left**2).sum())


def _floor(flops_B: np.ndarray, loss_BS: np.ndarray) -> float:
    mean_B1 = loss_BS.mean(axis=1, keepdims=True)

    def squares(floor: float) -> float:
        return _lines(flops_B, mean_B1, floor)[1]

    bounds = (0.0, _HIGHEST_FLOOR * loss_BS.min())
    found = optimize.minimize_scalar(squares, bounds=bounds, method="bounded")
    return float(found.x) if found.fun < squares(0.0) else 0.0


def gain(fitted: Fit, losses: Mapping[int, float], flops: float) -> Gain:
    """Computes an arm's compute-equivalent gain.

    For each seed, numerator = (baseline's fitted log-loss at the arm's FLOPs) - (arm's log-loss),
    both above the floor, and log g = mean numerator / mean slope. Seeds pair the two, so a seed
    that is far off in all arms does not matter. The interval is Fieller's for a ratio of paired
    means (Fieller 1954), exact for normal seeds; the floor counts as known.

    Args:
      fitted: the baseline's, by `fit`.
      losses: of the arm, by seed.
      flops: that the arm's training took.

    Raises:
      UserError: no seed in common, or FLOPs that are not above 0.
    """
    require(flops > 0, "flops", flops, "above 0")
    seeds = tuple(seed for seed in fitted.slopes if seed in losses)
    require(bool(seeds), "losses", sorted(losses), f"of a seed among {sorted(fitted.slopes)}")
    loss_S = np.array([losses[seed] for seed in seeds], float)
    slope_S = np.array([fitted.slopes[seed] for seed in seeds])
    intercept_S = np.array([fitted.intercepts[seed] for seed in seeds])
    if loss_S.min() <= fitted.floor or slope_S.mean() <= 0:
        return Gain(None, None, None, True, seeds)
    top_S = intercept_S - slope_S * math.log(flops) - np.log(loss_S - fitted.floor)
    value = _exp(top_S.mean() / slope_S.mean())
    outside = not fitted.least <= value * flops <= fitted.most
    return Gain(value, *_fieller(top_S, slope_S), outside, seeds)


def _fieller(top_S: np.ndarray, bottom_S: np.ndarray) -> tuple[float | None, float | None]:
    """95% interval of exp(mean of top / mean of bottom)."""
    count = len(top_S)
    if count < 2:
        return None, None
    factor = stats.t.ppf(0.975, count - 1) ** 2 / count
    covariance = np.cov(top_S, bottom_S)
    square = bottom_S.mean() ** 2 - factor * covariance[1, 1]
    if square <= 0:
        return None, None
    middle = top_S.mean() * bottom_S.mean() - factor * covariance[0, 1]
    rest = top_S.mean() ** 2 - factor * covariance[0, 0]
    reach = math.sqrt(max(0.0, middle**2 - square * rest))
    return _exp((middle - reach) / square), _exp((middle + reach) / square)


def _exp(value: float) -> float:
    # A slope near 0 makes any loss a matter of astronomic budgets.
    return math.exp(min(max(value, -300.0), 300.0))
