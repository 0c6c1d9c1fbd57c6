"""Tables have what differs, in words and few columns."""

import json

import pytest

from lightning_jax.ablation.report import cells
from lightning_jax.ablation.report.summary import summarize
from tests.ablation.fake_runs import decoded, small_sweep, write_sweep


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    arms = {**small_sweep().arms, "lost": {"model.unit": "GL"}}
    sweep = small_sweep(arms=arms)
    write_sweep(root, sweep)
    (root / "decode.json").write_text(json.dumps({"full": decoded(1234.5)}))
    return summarize(sweep, root)


def test_quality_has_the_verdict_beside_its_interval(report):
    header, *rows = cells.quality_rows(report)
    assert header == ["arm", "bits/byte", "difference [95%]", "verdict"]
    assert rows[0] == ["full", "2.0881", "-", "baseline"]
    assert rows[1][0] == "shared" and rows[1][3] == "undecided"
    percent = report["arms"][2]["difference"]["percent"]
    low, high = percent["low"], percent["high"]
    assert rows[2][2] == f"-4.79% [{low:+.2f}, {high:+.2f}]" and rows[2][3] == "better"
    assert rows[3] == ["lost", "-", "-", "no result"]


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((-0.3, -0.5, 0.1), "-0.30% [-0.50, +0.10]"),
        ((0.3, None, None), "+0.30%"),
        ((None, None, None), "-"),
    ],
)
def test_a_difference_without_an_interval_has_none(ends, text):
    assert cells.percent(dict(zip(("mean", "low", "high"), ends, strict=True))) == text


def test_costs_show_ratios_where_arms_differ_and_only_columns_that_are_known(report):
    header, full, shared, *_, lost = cells.cost_rows(report)
    assert header == ["arm", "active params", "KV B/token", "attn FLOPs"]
    assert "x" not in full[2] and shared[2].endswith("(x0.50)")
    assert lost == ["lost", "-", "-", "-"]
    header, full, shared, *_ = cells.time_rows(report)
    assert header == ["arm", "train min", "decode tok/s", "prefill s"]
    assert full[2:] == ["1,234", "0.25"] and shared[2:] == ["-", "-"]


@pytest.mark.parametrize(
    "rows", [cells.quality_rows, cells.cost_rows, cells.training_rows, cells.time_rows]
)
def test_tables_fit_80_columns(report, rows):
    columns = zip(*rows(report), strict=True)
    assert sum(max(map(len, column)) + 3 for column in columns) + 1 <= 80


def test_domains_are_columns_with_their_signal_to_noise(report):
    header, *rows = cells.domain_rows(report)
    assert header == ["arm", "code", "docs"]
    assert rows[2][1] == "1.9167 (-4.96%, better)" and rows[0][1] == "2.0167"
    assert rows[-1][0] == "signal/noise"


def test_the_csv_has_a_row_for_each_arm(report):
    rows = cells.csv_rows(report)
    assert [row["arm"] for row in rows] == ["full", "shared", "hybrid", "lost"]
    assert rows[2]["difference/verdict"] == "better" and rows[3] == {"arm": "lost", "seeds": 0}
    assert rows[1]["domains/docs"] == pytest.approx(2.5266667)


def test_changes_are_those_of_the_arm(report):
    assert cells.arm_rows(report)[2] == ["shared", "model.unit = Gg"]


@pytest.mark.parametrize(
    ("is_shown", "text"), [(True, "40.0% (-5.0, worse)"), (False, "40.0% (-5.0)")]
)
def test_a_task_that_does_not_tell_arms_apart_has_no_verdicts(report, is_shown, text):
    task = {
        "arms": {"full": {"mean": 0.45}, "shared": {"mean": 0.4}},
        "differences": {"shared": {"mean": -0.05, "verdict": "worse"}},
        "signal_to_noise": 2.0,
        "is_shown": is_shown,
    }
    header, full, shared, *_, ratios = cells.recall_rows({**report, "recall": {"passkey": task}})
    assert header == ["arm", "passkey"] and ratios == ["signal/noise", "2.0"]
    assert full[1] == "45.0%" and shared[1] == text
