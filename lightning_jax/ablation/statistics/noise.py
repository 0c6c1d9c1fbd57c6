"""Which metrics can tell arms apart, and how sure one run's score is of its documents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from lightning_jax.ablation.statistics import additive
from lightning_jax.ablation.statistics.additive import Scores, common_seeds, grid
from lightning_jax.config.fields import require

# A metric below it says less about the arms than about the seeds: shown, but not read.
SIGNAL_TO_NOISE = 1.0

_BATCH = 2**24  # numbers that a bootstrap holds at once


def signal_to_noise(scores: Scores, *, noise: float | None = None) -> float | None:
    """How far arms lie apart, in deviations of one run: a metric's power to tell them apart.

    After Heineman et al. 2025, "Signal and Noise" (arXiv 2508.13144), whose signal is the range
    over models and whose noise the deviation over the last checkpoints. The range of few noisy
    means is not 0 without any signal. So here the signal is the deviation over arms: the variance
    of the arms' means, less what noise adds to it, at least 0.

    Args:
      scores: by arm and seed.
      noise: standard deviation of one run's score, such as the mean of `checkpoint_noise`. None:
        of the residuals of an arm + seed model, which is the noise of paired comparisons.

    Returns:
      The ratio: 0 without signal, infinity without noise. None where fewer than two arms share
      seeds (two, or one where the noise is given).
    """
    full = max(scores, key=lambda arm: len(scores[arm]), default="")
    least = 2 if noise is None else 1
    arms = [arm for arm in scores if arm != full and len(common_seeds(scores, arm, full)) >= least]
    if not arms:
        return None
    fitted = additive.fit(grid(scores, [full, *arms]))
    variance = fitted.variance_R[0].item() if noise is None else noise**2
    count = len(arms) + 1
    effects_A = np.concatenate([[0.0], fitted.effects_RM[0]])
    # The expected variance of means that differ by noise alone.
    covariance = fitted.covariance_MM
    added = (covariance.trace() - covariance.sum() / count) / (count - 1)
    signal = max(0.0, effects_A.var(ddof=1).item() - added.item() * variance)
    if variance == 0:
        return math.inf if signal > 0 else 0.0
    return math.sqrt(signal / variance)


def checkpoint_noise(scores: Sequence[float]) -> float | None:
    """Standard deviation of one run's score over its last checkpoints, about a straight line.

    Args:
      scores: of evaluations at even distances, in order. The line takes off what training still
        gains from one to the next.

    Returns:
      The deviation, with n - 2 degrees of freedom; None for fewer than three scores.
    """
    if len(scores) < 3:
        return None
    steps = np.arange(len(scores))
    line = np.polynomial.Polynomial.fit(steps, scores, 1)
    residuals = np.asarray(scores) - line(steps)
    return math.sqrt((residuals**2).sum() / (len(scores) - 2))


def bootstrap_documents(
    nats_D: Sequence[float] | np.ndarray,
    bytes_D: Sequence[float] | np.ndarray,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of one run's bits per byte over documents (percentiles of a bootstrap).

    It says what other documents of the same kind would have changed, and nothing about other
    seeds. Differences of two runs with one seed are possible too: give the differences of nats.

    Args:
      nats_D: summed loss of each of D held-out documents.
      bytes_D: UTF-8 bytes of each document, above 0.
      confidence: of the interval.
      draws: resampled sets of documents.
      seed: of the resampling.

    Returns:
      Lower and upper end, in bits per byte.

    Raises:
      UserError: fewer than two documents, lists of different length, or a size that is not above 0.
    """
    nats, sizes = np.asarray(nats_D, float), np.asarray(bytes_D, float)
    require(nats.shape == sizes.shape, "bytes_D", sizes.shape, f"of shape {nats.shape}, as nats_D")
    require(nats.ndim == 1 and len(nats) > 1, "nats_D", nats.shape, "of two documents or more")
    require(bool((sizes > 0).all()), "bytes_D", float(sizes.min()), "above 0")

    def bits_per_byte(nats: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
        return nats.sum(axis=axis) / sizes.sum(axis=axis) / math.log(2)

    found = stats.bootstrap(
        (nats, sizes),
        bits_per_byte,
        paired=True,
        vectorized=True,
        n_resamples=draws,
        batch=max(1, _BATCH // len(nats)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
