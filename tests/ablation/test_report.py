"""The statistics are the textbook's, and gaps in a sweep are said, not hidden."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from lightning_jax.ablation import report
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import DOMAINS, small_sweep, write_rows, write_run

# Bits per byte on code by arm and seed; docs have 0.5 more.
SCORES = {
    "full": (2.00, 2.10, 1.95),
    "shared": (2.01, 2.12, 1.95),
    "hybrid": (1.90, 2.01, 1.84),
}


def make(tmp_path, sweep=None, scores=SCORES, **kinds):
    """Writes a sweep's folder; runs that `scores` does not reach are left out."""
    sweep = sweep or small_sweep()
    for run in sweep.runs():
        values = scores.get(run.arm, ())
        if run.seed < len(values) and values[run.seed] is not None:
            code = values[run.seed]
            write_run(sweep.config(run), run.folder(tmp_path), code=code, docs=code + 0.5, **kinds)
    fields = {key: getattr(sweep, key) for key in ("question", "base", "baseline", "arms", "seeds")}
    (tmp_path / "sweep.json").write_text(json.dumps(fields))
    return sweep


def by_arm(summary):
    return {arm["arm"]: arm for arm in summary["arms"]}


def pooled(code):
    sizes = [size for _, size in DOMAINS.values()]
    return float(np.average([code, code + 0.5], weights=sizes))


def test_summary_matches_scipy(tmp_path):
    sweep = make(tmp_path)
    arms = by_arm(report.summarize(sweep, tmp_path))
    for arm, codes in SCORES.items():
        values = np.array([pooled(code) for code in codes])
        got = arms[arm]["bits_per_byte"]
        assert got["mean"] == pytest.approx(values.mean())
        assert got["std"] == pytest.approx(values.std(ddof=1))
        assert (got["min"], got["max"]) == (values.min(), values.max())
        np.testing.assert_allclose(got["by_seed"], values)
        assert arms[arm]["domains"]["docs"] == pytest.approx(np.mean(codes) + 0.5)
    for arm in ("shared", "hybrid"):
        pairs = zip(SCORES[arm], SCORES["full"], strict=True)
        change = np.array([pooled(a) - pooled(b) for a, b in pairs])
        low, high = stats.t.interval(0.95, 2, loc=change.mean(), scale=stats.sem(change))
        got = arms[arm]["difference"]
        assert got["mean"] == pytest.approx(change.mean())
        assert (got["low"], got["high"]) == (pytest.approx(low), pytest.approx(high))
    assert arms["full"]["difference"] is None
    assert arms["shared"]["difference"]["verdict"] == "unclear"
    assert arms["hybrid"]["difference"]["verdict"] == "better"


def test_interval_by_hand():
    # differences 1, 2, 3: mean 2, s 1, t(0.975, 2) = 4.302653
    mean, half = report.paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert report.paired_difference([3.0], [1.0]) == (2.0, None)


def test_the_interval_covers_the_truth_at_its_rate():
    generator = np.random.default_rng(0)
    seeds = generator.normal(size=(2000, 3))
    pairs = zip(seeds + 0.3 + generator.normal(0, 0.1, (2000, 3)), seeds, strict=True)
    found = [report.paired_difference(a, b) for a, b in pairs]
    assert np.mean([abs(mean - 0.3) <= half for mean, half in found]) == pytest.approx(
        0.95, abs=0.02
    )


def test_equal_arms_have_a_zero_difference_that_is_not_a_finding(tmp_path):
    make(tmp_path, scores={"full": (2.0, 2.1, 1.9), "shared": (2.0, 2.1, 1.9)})
    got = by_arm(report.summarize(report.read_sweep(tmp_path), tmp_path))["shared"]["difference"]
    assert (got["mean"], got["low"], got["high"], got["verdict"]) == (0, 0, 0, "unclear")


def test_one_seed_has_no_interval(tmp_path):
    sweep = make(tmp_path, small_sweep(seeds=(0,)))
    summary = report.summarize(sweep, tmp_path)
    got = by_arm(summary)["shared"]
    assert got["bits_per_byte"]["std"] is None
    assert got["difference"]["low"] is None and got["difference"]["high"] is None
    assert got["difference"]["mean"] == pytest.approx(0.01)
    assert got["difference"]["verdict"] == "one seed"
    assert any("One seed" in note for note in summary["notes"])
    report.write_report(tmp_path)


def test_differences_use_common_seeds_and_gaps_are_named(tmp_path):
    scores = {"full": (2.0, None, 1.9), "shared": (2.1, 2.2, 1.9)}
    sweep = make(tmp_path, scores=scores)
    write_rows(tmp_path / "full" / "seed_1", 7)
    (tmp_path / "hybrid" / "seed_0").mkdir(parents=True)
    (tmp_path / "hybrid" / "seed_0" / "failure.txt").write_text("loss is not finite\n")
    summary = report.summarize(sweep, tmp_path)
    arms = by_arm(summary)
    assert arms["shared"]["difference"]["seeds"] == [0, 2]
    assert arms["shared"]["difference"]["mean"] == pytest.approx(0.05)
    assert arms["shared"]["seeds"] == [0, 1, 2]
    assert arms["hybrid"] == {"arm": "hybrid", "changes": {"model.unit": "LG"}, "seeds": []}
    reasons = {(run["arm"], run["seed"]): run["reason"] for run in summary["missing"]}
    assert reasons == {
        ("full", 1): "stopped at step 7",
        ("hybrid", 0): "failed: loss is not finite",
        ("hybrid", 1): "not started",
        ("hybrid", 2): "not started",
    }
    assert summary["notes"][0] == "Incomplete: 4 of 9 runs have no result."
    _, rows = report.table_rows(summary)
    assert rows[2][:3] == ["hybrid", "0", "no result"]


def test_a_missing_baseline_leaves_no_differences(tmp_path):
    sweep = make(tmp_path, scores={"shared": SCORES["shared"]})
    summary = report.summarize(sweep, tmp_path)
    assert by_arm(summary)["shared"]["difference"] is None
    assert any("baseline 'full' has no result" in note for note in summary["notes"])
    header, rows = report.table_rows(summary)
    assert {len(row) for row in rows} == {len(header)}
    report.write_report(tmp_path)


def test_a_result_that_is_not_finite_is_missing(tmp_path):
    sweep = make(tmp_path, scores={**SCORES, "shared": (2.0, math.nan, 2.0)})
    summary = report.summarize(sweep, tmp_path)
    assert summary["missing"] == [
        {"arm": "shared", "seed": 1, "reason": "bits_per_byte is not finite"}
    ]
    assert by_arm(summary)["shared"]["seeds"] == [0, 2]


def test_different_held_out_text_is_pointed_out(tmp_path):
    sweep = make(tmp_path)
    path = tmp_path / "full" / "seed_0" / "evaluation.json"
    rows = json.loads(path.read_text())
    rows["code"]["bytes"] += 1
    path.write_text(json.dumps(rows))
    notes = report.summarize(sweep, tmp_path)["notes"]
    assert any("3,500 to 3,501 bytes" in note for note in notes)


def test_costs_are_those_of_the_arms(tmp_path):
    sweep = make(tmp_path, experts=2.5)
    arms = by_arm(report.summarize(sweep, tmp_path))
    attention = sweep.config(sweep.runs()[0]).model.attention
    owner = 2 * 2 * attention.num_kv_heads * attention.head_dim
    cache = {arm: arms[arm]["costs"]["kv_bytes_per_token"] for arm in arms}
    assert cache["shared"] == cache["full"] / 2
    assert cache["full"] == 2 * owner
    # A window of 8 keys in a context of 65536 costs next to nothing.
    assert cache["full"] / 2 < cache["hybrid"] < cache["full"] / 2 * 1.001
    flops = {arm: arms[arm]["costs"]["attention_flops_per_token"] for arm in arms}
    assert flops["shared"] == flops["full"] and flops["hybrid"] < 0.51 * flops["full"]
    assert arms["full"]["costs"]["experts_per_token"] == pytest.approx(2.5)
    assert arms["full"]["costs"]["tokens_per_second"] == 100.0


def test_the_folder_gets_the_report(tmp_path, capsys):
    make(tmp_path)
    summary = report.write_report(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == summary
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "hybrid" in (tmp_path / "report.html").read_text(encoding="utf-8")
    report.print_report(summary)
    output = capsys.readouterr()
    assert output.out == "" and "better" in output.err


@pytest.mark.parametrize("folder", ["nothing", "."])
def test_a_folder_without_a_sweep_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="must be a folder that experiments.sweep made"):
        report.write_report(tmp_path / folder)


def test_a_sweep_without_results_is_refused(tmp_path):
    make(tmp_path, scores={})
    with pytest.raises(UserError, match="no run of the sweep has a result"):
        report.write_report(tmp_path)
