"""Which arms differ from the baseline, and which are equivalent to it: verdicts over seeds.

Runs of one seed see the same text in the same order and start from the same values, so arms are
compared seed by seed. All intervals of a comparison hold together with the confidence stated, and
every verdict is read off its interval, so that a picture of the intervals shows the verdicts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from lightning_jax.ablation import additive, dunnett
from lightning_jax.ablation.power import seeds_needed
from lightning_jax.config.errors import suggest
from lightning_jax.config.fields import require

Scores = Mapping[str, Mapping[int, float]]
"""A score by arm and seed; a run without a result is left out."""

# Residuals are pooled where the hypothesis of equal deviations has at least this p-value.
POOLING_P = 0.2


@dataclasses.dataclass(frozen=True)
class Difference:
    """One arm minus the baseline.

    `seeds` are those that both have. `mean` is None without any; `low`, `high`, `p`,
    `p_equivalent` and `deviation` are None with fewer than two, and the verdict is then
    "undecided". `low` and `high` hold for all arms together. `p` (of no difference, two-sided) and
    `p_equivalent` (of a difference as large as the margin) are adjusted for the number of arms;
    a verdict other than "undecided" has one of them at or below 1 - confidence. `deviation` is of
    one paired difference. `seeds_needed`, of an arm that is undecided: so many seeds of every arm
    decide it with a probability of 80%, if the difference is what was measured; None above 200,
    or where nothing is known.
    """

    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    p_equivalent: float | None
    verdict: str
    seeds: tuple[int, ...]
    seeds_needed: int | None
    deviation: float | None
    margin: float
    confidence: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All arms against the baseline.

    `margin` is in the unit of the scores. `method` says in one sentence what was done.
    `homogeneity_p` is of the hypothesis that all arms have one deviation (None where that cannot
    be tested). `deviation` is of one paired difference, pooled over arms (None where it is not
    pooled), `degrees` the degrees of freedom of the intervals (the least of all arms; 0 without
    any interval).
    """

    margin: float
    method: str
    homogeneity_p: float | None
    deviation: float | None
    degrees: int
    differences: dict[str, Difference]


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Differences of A arms to the baseline, and intervals that hold together.

    Arrays are [A]: `mean`, `error` (its standard error), `low`, `high`, `p` (adjusted for the
    family). `deviation` is of one paired difference, `degrees` its degrees of freedom. `pooled`:
    whether the residuals of all arms estimate one deviation; `correlation`: the least of two arms'
    means (only where pooled).
    """

    arms: tuple[str, ...]
    mean: np.ndarray
    error: np.ndarray
    deviation: np.ndarray
    degrees: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    pooled: bool
    correlation: float
    homogeneity_p: float | None

    def adjusted_p(self, index: int, statistic: float) -> float:
        """Family-wise two-sided p-value of a t statistic of one arm, in a single step."""
        if statistic <= 0:
            return 1.0
        count, degrees = len(self.arms), int(self.degrees[index])
        if self.pooled:
            return dunnett.tail(statistic, count, degrees, self.correlation)
        return min(1.0, count * 2 * float(stats.t.sf(statistic, degrees)))


def compare(
    scores: Scores,
    baseline: str,
    *,
    margin: float,
    confidence: float = 0.95,
    lower_is_better: bool = True,
) -> Comparison:
    """Compares every arm with the baseline and gives each a verdict.

    An arm is "equivalent" where its whole interval lies within the margin (two one-sided tests,
    Schuirmann 1987, each at half of 1 - confidence), else "better" or "worse" where its interval
    excludes 0, else "undecided". The intervals are those of `estimate`, so all verdicts of a
    comparison are right together with the confidence.

    Args:
      scores: by arm and seed.
      baseline: one of the arms.
      margin: difference that matters, in the unit of the scores, above 0.
      confidence: that all intervals hold together.
      lower_is_better: of the scores.

    Raises:
      UserError: an unknown baseline, a score that is not finite, a margin or a confidence out of
        its range.
    """
    require(math.isfinite(margin) and margin > 0, "margin", margin, "a number above 0")
    found = estimate(scores, baseline, confidence=confidence)
    differences = {}
    for arm in scores:
        if arm == baseline:
            continue
        seeds = _common(scores, arm, baseline)
        if arm not in found.arms:
            changes = [scores[arm][seed] - scores[baseline][seed] for seed in seeds]
            mean = changes[0] if changes else None
            differences[arm] = Difference(
                mean, None, None, None, None, "undecided", seeds, None, None, margin, confidence
            )
            continue
        index = found.arms.index(arm)
        low, high = float(found.low[index]), float(found.high[index])
        verdict = _verdict(low, high, margin, lower_is_better)
        room = _ratio(margin - abs(found.mean[index]), found.error[index])
        differences[arm] = Difference(
            mean=float(found.mean[index]),
            low=low,
            high=high,
            p=float(found.p[index]),
            p_equivalent=found.adjusted_p(index, room),
            verdict=verdict,
            seeds=seeds,
            seeds_needed=_seeds_needed(found, index, len(seeds), margin, confidence)
            if verdict == "undecided"
            else None,
            deviation=float(found.deviation[index]),
            margin=margin,
            confidence=confidence,
        )
    return Comparison(
        margin=margin,
        method=_method(found, confidence),
        homogeneity_p=found.homogeneity_p,
        deviation=float(found.deviation[0]) if found.pooled else None,
        degrees=int(found.degrees.min()) if found.arms else 0,
        differences=differences,
    )


def estimate(scores: Scores, baseline: str, *, confidence: float = 0.95) -> Estimates:
    """Estimates the differences to the baseline, with intervals that hold together.

    Scores are arm + seed + residual. Where the residuals' variances do not differ by arm
    (Bartlett's statistic, its distribution simulated for this grid of runs, p >= `POOLING_P`), all
    residuals estimate one deviation and the intervals are Dunnett's; a grid with gaps is fitted by
    least squares. Otherwise every arm has Student's t of its own paired differences, p-values are
    Holm's, and the intervals those that belong to Holm's procedure (Guilbaud, Biometrical Journal
    50, 2008): Bonferroni's, but what Holm finds different from 0 ends at 0. Arms that share fewer
    than two seeds with the baseline are left out.

    Raises:
      UserError: an unknown baseline, a score that is not finite, a confidence out of its range.
    """
    _check(scores, baseline, confidence)
    arms = tuple(
        arm for arm in scores if arm != baseline and len(_common(scores, arm, baseline)) > 1
    )
    if not arms:
        none = np.zeros(0)
        return Estimates(arms, none, none, none, none, none, none, none, False, 0.0, None)
    grid_AS = _grid(scores, (baseline, *arms))
    fitted = additive.fit(grid_AS)
    if fitted.homogeneity_p is None or fitted.homogeneity_p >= POOLING_P:
        return _pooled(arms, fitted, confidence)
    return _separate(arms, grid_AS[1:] - grid_AS[0], fitted.homogeneity_p, confidence)


def _check(scores: Scores, baseline: str, confidence: float) -> None:
    require(baseline in scores, "baseline", baseline, suggest(baseline, scores))
    require(0.5 <= confidence < 1, "confidence", confidence, "in [0.5, 1)")
    for arm, values in scores.items():
        for seed, value in values.items():
            require(math.isfinite(value), f"score of {arm} seed {seed}", value, "finite")


def _common(scores: Scores, arm: str, baseline: str) -> tuple[int, ...]:
    return tuple(sorted(set(scores[arm]) & set(scores[baseline])))


def _grid(scores: Scores, arms: tuple[str, ...]) -> np.ndarray:
    seeds = sorted({seed for arm in arms for seed in scores[arm]})
    return np.array([[scores[arm].get(seed, np.nan) for seed in seeds] for arm in arms])


def _pooled(arms: tuple[str, ...], fitted: additive.Additive, confidence: float) -> Estimates:
    variances = np.diag(fitted.covariance)
    correlation = 0.5
    if len(arms) > 1:
        correlations = fitted.covariance / np.sqrt(np.outer(variances, variances))
        # With gaps correlations differ. The least gives the widest intervals.
        correlation = round(float(np.clip(correlations.min(), 0, 0.999)), 6)
    count, degrees = len(arms), fitted.degrees
    error = fitted.deviation * np.sqrt(variances)
    half = dunnett.critical_value(count, degrees, confidence, correlation) * error
    mean = fitted.effects
    statistics = [_ratio(abs(m), e) for m, e in zip(mean, error, strict=True)]
    p = [dunnett.tail(statistic, count, degrees, correlation) for statistic in statistics]
    return Estimates(
        arms=arms,
        mean=mean,
        error=error,
        deviation=np.full(count, fitted.deviation * math.sqrt(2)),
        degrees=np.full(count, degrees),
        low=mean - half,
        high=mean + half,
        p=np.array(p),
        pooled=True,
        correlation=correlation,
        homogeneity_p=fitted.homogeneity_p,
    )


def _separate(
    arms: tuple[str, ...], changes_AS: np.ndarray, homogeneity_p: float, confidence: float
) -> Estimates:
    seeds = np.isfinite(changes_AS).sum(axis=1)
    mean, deviation = np.nanmean(changes_AS, axis=1), np.nanstd(changes_AS, axis=1, ddof=1)
    error, degrees, count = deviation / np.sqrt(seeds), seeds - 1, len(arms)
    half = stats.t.ppf(1 - (1 - confidence) / (2 * count), degrees) * error
    statistics = np.array([_ratio(abs(m), e) for m, e in zip(mean, error, strict=True)])
    p = _holm(2 * stats.t.sf(statistics, degrees))
    found = p <= 1 - confidence
    low, high = mean - half, mean + half
    low = np.where(found & (mean > 0), np.maximum(low, 0), low)
    high = np.where(found & (mean < 0), np.minimum(high, 0), high)
    return Estimates(arms, mean, error, deviation, degrees, low, high, p, False, 0.0, homogeneity_p)


def _holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p)
    steps = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps * p[order]))
    return adjusted


def _ratio(value: float, error: float) -> float:
    """A t statistic; runs that repeat each other exactly have no error."""
    if error > 0:
        return float(value / error)
    return math.copysign(math.inf, value) if value else 0.0


def _verdict(low: float, high: float, margin: float, lower_is_better: bool) -> str:
    if -margin < low and high < margin:
        return "equivalent"
    if high < 0 or low > 0 or (low == 0) != (high == 0):
        return "better" if (low + high < 0) == lower_is_better else "worse"
    return "undecided"


def _seeds_needed(
    found: Estimates, index: int, seeds: int, margin: float, confidence: float
) -> int | None:
    return seeds_needed(
        float(found.deviation[index]),
        margin,
        arms=len(found.arms),
        true_difference=float(found.mean[index]),
        pilot_degrees=int(found.degrees[index]),
        confidence=confidence,
        pooled=found.pooled,
        least=seeds + 1,
    )


def _method(found: Estimates, confidence: float) -> str:
    count, sure = len(found.arms), f"{confidence:.0%}"
    if not count:
        return "No arm shares two seeds with the baseline, so nothing can be compared."
    if count == 1:
        return f"Paired differences by seed with a {sure} interval of Student's t."
    tested = "" if found.homogeneity_p is None else f" (test: p = {found.homogeneity_p:.2g})"
    if found.pooled:
        return (
            f"Paired by seed; residuals of an arm + seed model pooled over arms, whose deviations "
            f"do not differ visibly{tested}; Dunnett's intervals, which hold for all {count} arms "
            f"together with {sure} confidence."
        )
    return (
        f"Paired by seed, each arm with a deviation of its own, because deviations differ{tested}; "
        f"Student's t with Holm's correction: the intervals hold for all {count} arms together "
        f"with {sure} confidence."
    )


def sentence(
    arm: str,
    baseline: str,
    difference: Difference,
    relative_to: float,
    *,
    metric: str = "bits per byte",
) -> str:
    """Says in plain English what a comparison found about one arm.

    Args:
      arm: the arm's name.
      baseline: the baseline's name.
      difference: of the arm to the baseline.
      relative_to: the baseline's mean score, above 0; percentages are of it.
      metric: what the scores count, in the plural.
    """

    def share(value: float) -> str:
        return f"{100 * abs(value) / relative_to:.2f}%"

    def change(value: float) -> str:
        return f"{share(value)} {'fewer' if value < 0 else 'more'}"

    mean, low, high = difference.mean, difference.low, difference.high
    if mean is None or low is None or high is None:
        shared = "one seed" if difference.seeds else "no seed"
        return f"{arm} against {baseline} is undecided: they share {shared}; two are the least."
    sure = f"{100 * difference.confidence:g}%"
    limit = f"{100 * difference.margin / relative_to:.2g}%"
    excludes_zero = low >= 0 or high <= 0
    reach = f"{sure}: {change(low)} to {change(high)}"
    if excludes_zero:
        near, far = sorted((abs(low), abs(high)))
        reach = f"{sure}: {share(near)} to {share(far)}"
    if difference.verdict in ("better", "worse"):
        return (
            f"{arm} needs {change(mean)} {metric} than {baseline} ({reach}): {difference.verdict}."
        )
    if difference.verdict == "equivalent":
        text = f"{arm} is equivalent to {baseline}: {metric} differ by less than {limit} ({reach})."
        if excludes_zero and mean:
            text += f" It needs {change(mean)}: a real difference, but smaller than the margin."
        return text
    more = (
        f"about {difference.seeds_needed} seeds would decide a margin of {limit}"
        if difference.seeds_needed
        else f"more than 200 seeds would be needed for a margin of {limit}"
    )
    return f"{arm} against {baseline} is undecided ({reach} {metric}): {more}."
