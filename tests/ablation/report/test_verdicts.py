"""Verdicts come with the numbers that their picture shows, or are withheld."""

import numpy as np
import pytest
from scipy import stats

from lightning_jax.ablation.report import verdicts

SCORES = {"base": {0: 2.0, 1: 2.2, 2: 1.9, 5: 3.0}, "arm": {0: 1.9, 1: 2.08, 2: 1.81}}


def rows(**sizes):
    """Runs with the bytes of one domain each."""
    return {arm: {0: {"domains": {"code": {"bytes": size}}}} for arm, size in sizes.items()}


def test_one_arm_has_the_textbooks_interval_in_percent_of_the_baseline():
    found = verdicts.judge(SCORES, "base", margin=0.005, is_answer=True)["differences"]["arm"]
    change = np.array([-0.1, -0.12, -0.09])
    whole = np.mean([2.0, 2.2, 1.9, 3.0])
    low, high = stats.t.interval(0.95, 2, loc=change.mean(), scale=stats.sem(change))
    assert found["seeds"] == [0, 1, 2] and found["verdict"] == "better"
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    assert found["percent"]["mean"] == pytest.approx(100 * change.mean() / whole)
    np.testing.assert_allclose(found["by_seed"], 100 * change / whole)
    assert found["sentence"].startswith("arm needs 4.54% fewer bits per byte than base")


def test_more_may_be_better_and_margins_absolute():
    scores = {arm: {s: -v for s, v in values.items()} for arm, values in SCORES.items()}
    found = verdicts.judge(scores, "base", margin=0.02, relative_to=1.0, lower_is_better=False)
    assert found["margin"] == 0.02
    assert found["differences"]["arm"]["verdict"] == "better"
    assert found["differences"]["arm"]["percent"]["mean"] == pytest.approx(100 * 0.31 / 3)


@pytest.mark.parametrize("scores", [{"arm": {0: 1.0}}, {"base": {0: 1.0}}, {}])
def test_nothing_to_compare_is_none(scores):
    assert verdicts.judge(scores, "base", margin=0.005) is None
    assert "No arm can be compared" in verdicts.headline("base", None, 0.005)


def test_the_headline_names_every_arm_once():
    differences = {
        arm: {"verdict": verdict, "seeds": [0] * seeds}
        for arm, verdict, seeds in [("a", "better", 3), ("b", "undecided", 2), ("c", "better", 3)]
    }
    assert verdicts.headline("base", {"differences": differences}, 0.005) == (
        "Against base, a and c are better; b is undecided. Held-out bits per byte, 2 to 3 paired "
        "seeds, margin 0.5%."
    )


def test_scores_leave_out_what_was_not_measured():
    found = {"a": {0: {"x": 1.0}, 1: {}}, "b": {0: {}}}
    assert verdicts.scores_of(found, lambda row: row.get("x")) == {"a": {0: 1.0}}


def test_spread_of_one_seed_has_no_deviation():
    found = verdicts.spread({3: 2.0, 1: 4.0})
    assert (found["mean"], found["min"], found["max"]) == (3.0, 2.0, 4.0)
    assert found["by_seed"] == [2.0, 4.0] and found["std"] == pytest.approx(2**0.5)
    assert verdicts.spread({0: 2.0})["std"] is None


def test_verdicts_are_withheld_where_held_out_bytes_differ():
    assert verdicts.why_withheld(rows(a=100, b=100)) is None
    assert verdicts.why_withheld({}) is None
    assert verdicts.why_withheld(rows(a=100, b=101, c=101)) == (
        "held-out text of code differs between runs: 100 bytes in a seed 0; 101 bytes in b seed 0 "
        "and 1 more"
    )
    found = rows(a=100, b=100)
    found["b"][0]["domains"]["docs"] = {"bytes": 5}
    assert "docs differs between runs: none in a seed 0" in verdicts.why_withheld(found)
