"""Which arms differ from the baseline, and which are equivalent to it: verdicts over seeds.

Runs of one seed see the same text in the same order and start from the same values, so arms are
compared seed by seed. All intervals of a comparison hold together with the confidence stated, and
every verdict is read off its interval, so that a picture of the intervals shows the verdicts.
"""

from __future__ import annotations

import dataclasses
import math

from lightning_jax.ablation.statistics.additive import Scores, common_seeds, grid
from lightning_jax.ablation.statistics.intervals import Intervals, intervals
from lightning_jax.ablation.statistics.power import MOST_SEEDS, seeds_needed
from lightning_jax.config.errors import suggest
from lightning_jax.config.fields import require


@dataclasses.dataclass(frozen=True)
class Difference:
    """One arm minus the baseline.

    `seeds` are those that both have. `mean` is None without any; `low`, `high`, `p`,
    `p_equivalent` and `deviation` (of one paired difference) are None with fewer than two, and the
    verdict is then "undecided". `low` and `high` hold for all arms together with `confidence`. `p`
    (of no difference, two-sided) and `p_equivalent` (of a difference of `margin` or more) are
    adjusted for the number of arms. `seeds_needed`, where undecided: the number of seeds of every
    arm that decide with a probability of 80%, if the true difference is the measured one; None
    where that is above `power.MOST_SEEDS`, nothing is known, or nobody has asked.
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


def compare(
    scores: Scores,
    baseline: str,
    *,
    margin: float,
    confidence: float = 0.95,
    lower_is_better: bool = True,
    plan: bool = True,
) -> Comparison:
    """Compares every arm with the baseline and gives each a verdict.

    An arm is "equivalent" where its whole interval lies within the margin (two one-sided tests,
    Schuirmann 1987, each at half of 1 - confidence), else "better" or "worse" where its interval
    excludes 0, else "undecided". The intervals are those of `statistics.intervals`, so all verdicts
    of a comparison are right together with the confidence.

    Args:
      scores: by arm and seed.
      baseline: one of the arms.
      margin: difference that matters, in the unit of the scores, above 0.
      confidence: that all intervals hold together.
      lower_is_better: of the scores.
      plan: find `seeds_needed`, which takes simulations.

    Raises:
      UserError: an unknown baseline, a score that is not finite, a margin or a confidence out of
        its range.
    """
    _check(scores, baseline, margin, confidence)
    common = {arm: common_seeds(scores, arm, baseline) for arm in scores if arm != baseline}
    differences = {}
    for arm, seeds in common.items():
        first = scores[arm][seeds[0]] - scores[baseline][seeds[0]] if seeds else None
        differences[arm] = Difference(
            first, None, None, None, None, "undecided", seeds, None, None, margin, confidence
        )
    family = [arm for arm, seeds in common.items() if len(seeds) > 1]
    if not family:
        method = "No arm shares two seeds with the baseline, so there are no intervals."
        return Comparison(margin, method, None, None, 0, differences)
    found = intervals(grid(scores, [baseline, *family]), confidence)
    p_M = found.p_M()
    for index, arm in enumerate(family):
        low, high = found.low_RM[0, index].item(), found.high_RM[0, index].item()
        verdict = _verdict(low, high, margin, lower_is_better)
        differences[arm] = dataclasses.replace(
            differences[arm],
            mean=found.mean_RM[0, index].item(),
            low=low,
            high=high,
            p=p_M[index].item(),
            p_equivalent=found.equivalence_p(margin, index),
            verdict=verdict,
            seeds_needed=_seeds_needed(found, index, len(common[arm]), margin, confidence)
            if plan and verdict == "undecided"
            else None,
            deviation=found.deviation_RM[0, index].item(),
        )
    tested = found.homogeneity_p_R
    return Comparison(
        margin=margin,
        method=_method(found, confidence),
        homogeneity_p=None if tested is None else tested[0].item(),
        deviation=found.pooled_deviation_R[0].item() if found.pooled_R[0] else None,
        degrees=found.degrees_RM[0].min().item(),
        differences=differences,
    )


def _check(scores: Scores, baseline: str, margin: float, confidence: float) -> None:
    require(baseline in scores, "baseline", baseline, suggest(baseline, scores))
    require(math.isfinite(margin) and margin > 0, "margin", margin, "a number above 0")
    require(0.5 <= confidence < 1, "confidence", confidence, "in [0.5, 1)")
    for arm, values in scores.items():
        for seed, value in values.items():
            require(math.isfinite(value), f"score of {arm} seed {seed}", value, "finite")


def _verdict(low: float, high: float, margin: float, lower_is_better: bool) -> str:
    if -margin < low and high < margin:
        return "equivalent"
    if low < 0 < high:
        return "undecided"
    return "better" if (low + high < 0) == lower_is_better else "worse"


def _seeds_needed(
    found: Intervals, index: int, seeds: int, margin: float, confidence: float
) -> int | None:
    return seeds_needed(
        found.deviation_RM[0, index].item(),
        margin,
        arms=found.mean_RM.shape[1],
        true_difference=found.mean_RM[0, index].item(),
        pilot_degrees=found.degrees_RM[0, index].item(),
        confidence=confidence,
        pooled=found.pooled_R[0].item(),
        least=seeds + 1,
    )


def _method(found: Intervals, confidence: float) -> str:
    count, sure = found.mean_RM.shape[1], f"{100 * confidence:g}%"
    if found.homogeneity_p_R is None:
        return f"Paired differences by seed, with {sure} intervals of Student's t."
    together = f"the {sure} intervals hold for all {count} arms together"
    tested = f"p = {found.homogeneity_p_R[0]:.2g}"
    if found.pooled_R[0]:
        return (
            "Paired differences by seed, with the residuals of an arm + seed model pooled over "
            f"arms (test of equal deviations: {tested}) and Dunnett's correction: {together}."
        )
    return (
        "Paired differences by seed, each arm with a deviation of its own (test of equal "
        f"deviations: {tested}), Student's t and Holm's correction: {together}."
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

    Raises:
      UserError: `relative_to` is not above 0.
    """
    require(relative_to > 0, "relative_to", relative_to, "above 0")

    def share(value: float) -> str:
        return f"{100 * abs(value) / relative_to:.2f}%"

    def change(value: float) -> str:
        size = share(value)
        return size if size == share(0) else f"{size} {'fewer' if value < 0 else 'more'}"

    mean, low, high = difference.mean, difference.low, difference.high
    if mean is None:
        return f"{arm} against {baseline} is undecided: no seed has a result of both."
    if low is None or high is None:
        return (
            f"{arm} against {baseline} is undecided: one seed ({change(mean)} {metric}) has no "
            "interval."
        )
    sure = f"{100 * difference.confidence:g}%"
    limit = f"{100 * difference.margin / relative_to:.3g}%"
    differs = not low < 0 < high and mean != 0
    if differs:
        near, far = sorted((abs(low), abs(high)))
        reach = f"({sure}: {share(near)} to {share(far)})"
    else:
        reach = f"({sure}: {change(low)} to {change(high)})"
    if difference.verdict == "equivalent":
        start = f"{arm} is equivalent to {baseline}"
        if differs:
            return (
                f"{start}: it needs {change(mean)} {metric} {reach}, a real difference but below "
                f"the margin of {limit}."
            )
        return f"{start}: {metric} differ by less than {limit} {reach}."
    if differs:
        return f"{arm} needs {change(mean)} {metric} than {baseline} {reach}: {difference.verdict}."
    decides = f"{difference.seeds_needed} seeds would decide a margin of {limit}"
    if difference.seeds_needed is None:
        decides = f"a margin of {limit} needs more than {MOST_SEEDS} seeds"
    return f"{arm} against {baseline} is undecided {reach}: {decides}."
