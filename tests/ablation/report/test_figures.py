"""Figures show the numbers of the verdicts, whatever a sweep has of them."""

import json

import numpy as np
import pytest

from lightning_jax.ablation.report import figures
from lightning_jax.ablation.report.summary import summarize
from tests.ablation.fake_runs import SCORES, decoded, small_sweep, write_sweep


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root)
    speeds = {arm: decoded(100.0 * n) for n, arm in enumerate(SCORES, 1)}
    (root / "decode.json").write_text(json.dumps(speeds))
    return summarize(small_sweep(), root)


def bars(axes):
    """The ends of the error bars, one array [2, 2] of points each."""
    containers = [found for found in axes.containers if found.has_xerr or found.has_yerr]
    return [found.lines[2][0].get_segments()[0] for found in containers]


def test_the_intervals_are_those_of_the_verdicts(report):
    axes = figures.intervals(report).axes[0]
    compared = [arm for arm in report["arms"] if arm["difference"]]
    for arm, segment in zip(compared, bars(axes), strict=True):
        percent = arm["difference"]["percent"]
        np.testing.assert_allclose(segment[:, 0], [percent["low"], percent["high"]])
    assert [text.get_text() for text in axes.texts] == ["undecided", "better"]
    low, high = axes.get_xlim()
    assert low < min(arm["difference"]["percent"]["low"] for arm in compared) and high > 0.5


def test_trades_are_of_the_costs_in_which_arms_differ(report):
    found = figures.trades(report)
    assert set(found) == {"kv", "flops", "params", "decode"}
    axes = found["decode"].axes[0]
    percent = report["arms"][2]["difference"]["percent"]
    np.testing.assert_allclose(bars(axes)[-1][:, 1], [percent["low"], percent["high"]])
    low, high = axes.get_xlim()
    assert low < 100 and high > 300
    equal = {"arms": [{**arm, "costs": report["arms"][0]["costs"], "decode": None}
                      for arm in report["arms"]]}  # fmt: skip
    assert figures.trades({**report, **equal}) == {}


def test_without_differences_there_is_no_figure_of_them(tmp_path):
    sweep = write_sweep(tmp_path, scores={"shared": SCORES["shared"]})
    alone = summarize(sweep, tmp_path)
    assert figures.intervals(alone) is None and figures.trades(alone) == {}
    assert figures.gains(alone) is None and figures.learning(alone, {}) is None


def test_one_seed_is_a_point_without_an_interval(tmp_path):
    sweep = write_sweep(tmp_path, small_sweep(seeds=(0,)))
    axes = figures.intervals(summarize(sweep, tmp_path)).axes[0]
    assert bars(axes) == []


def test_curves_have_a_panel_of_paired_differences(report):
    tokens = np.arange(10.0)
    one = tokens, {0: 5 - tokens / 10, 1: 5.5 - tokens / 10}
    better = tokens, {0: 4.9 - tokens / 10, 1: 5.4 - tokens / 10}
    top, bottom = figures.learning(report, {"full": one, "hybrid": better}).axes
    assert len(top.lines) == 2
    np.testing.assert_allclose(bottom.lines[1].get_ydata(), -0.1)
    assert len(figures.learning(report, {"shared": one}).axes) == 1


def test_arms_lead_to_the_budget_with_their_loss(report):
    trend = {
        "budgets": [{"share": 1.0, "flops": 1e9, "by_seed": {0: 2.0}},
                    {"share": 4.0, "flops": 4e9, "by_seed": {0: 1.0}}],
        "fit": {"floor": 0.0, "slopes": {0: 0.5}, "intercepts": {0: np.log(2e9**0.5 * 2**0.5)}},
    }  # fmt: skip
    reached = {"value": 2.0, "flops": 1e9, "extrapolated": False}
    lost = {"value": None, "flops": 1e9, "extrapolated": True}
    gains = [None, reached, lost]
    arms = [{**arm, "gain": gain} for arm, gain in zip(report["arms"], gains, strict=True)]
    axes = figures.gains({**report, "arms": arms, "scaling": trend}).axes[0]
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in dotted] == [[1e9, 2e9]]


def test_twelve_arms_look_different():
    looks = figures.looks({"arms": [{"arm": f"arm{i}"} for i in range(12)]})
    assert len({(look["color"], look["linestyle"]) for look in looks.values()}) == 12
