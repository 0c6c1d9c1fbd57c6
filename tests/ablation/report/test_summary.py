"""The summary is what the runs' folders say; gaps in a sweep are said, not hidden."""

import json
import math

import numpy as np
import pytest

from lightning_jax.ablation.report import cells, figures
from lightning_jax.ablation.report.summary import summarize
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import (
    SCORES,
    decoded,
    pooled,
    searched,
    small_sweep,
    write_rows,
    write_sweep,
)
from tests.tiny import tiny_config


def by_arm(summary):
    return {arm["arm"]: arm for arm in summary["arms"]}


def test_scores_verdicts_and_sentences(tmp_path):
    sweep = write_sweep(tmp_path)
    summary = summarize(sweep, tmp_path)
    arms = by_arm(summary)
    for arm, codes in SCORES.items():
        got = arms[arm]["bits_per_byte"]
        np.testing.assert_allclose(got["by_seed"], [pooled(code) for code in codes])
        assert got["mean"] == pytest.approx(np.mean(got["by_seed"]))
        assert summary["domains"]["docs"]["arms"][arm] == pytest.approx(np.mean(codes) + 0.5)
    for arm in ("shared", "hybrid"):
        change = np.mean(np.subtract(SCORES[arm], SCORES["full"]))
        assert arms[arm]["difference"]["mean"] == pytest.approx(change)
    assert arms["full"]["difference"] is None
    assert "full is the baseline: 2.0881 bits per byte" in arms["full"]["sentence"]
    assert arms["shared"]["difference"]["verdict"] == "undecided"
    assert arms["hybrid"]["difference"]["verdict"] == "better"
    assert arms["hybrid"]["sentence"] == arms["hybrid"]["difference"]["sentence"]
    assert summary["headline"].startswith("Against full, hybrid is better; shared is undecided.")
    margin = summary["margin"]
    assert margin == {"share": 0.005, "bits_per_byte": pytest.approx(0.005 * 2.088095)}
    # The same numbers make the verdict and its picture.
    found = arms["hybrid"]["difference"]
    assert found["percent"]["high"] == pytest.approx(100 * found["high"] / 2.088095)
    assert found["margin"] == margin["bits_per_byte"]


def test_equal_arms_are_equivalent_never_the_same(tmp_path):
    sweep = write_sweep(tmp_path, scores={"full": (2.0, 2.1, 1.9), "shared": (2.0, 2.1, 1.9)})
    got = by_arm(summarize(sweep, tmp_path))["shared"]["difference"]
    assert (got["mean"], got["verdict"]) == (0, "equivalent")


def test_one_seed_has_no_interval(tmp_path):
    sweep = write_sweep(tmp_path, small_sweep(seeds=(0,)))
    summary = summarize(sweep, tmp_path)
    got = by_arm(summary)["shared"]
    assert got["bits_per_byte"]["std"] is None
    assert got["difference"]["low"] is None and got["difference"]["verdict"] == "undecided"
    assert got["difference"]["mean"] == pytest.approx(0.01)
    assert any("One seed" in note for note in summary["notes"])
    assert summary["domains"]["code"]["is_shown"] is False


def test_differences_use_common_seeds_and_gaps_are_named(tmp_path):
    scores = {"full": (2.0, None, 1.9), "shared": (2.1, 2.2, 2.0)}
    sweep = write_sweep(tmp_path, scores=scores)
    write_rows(tmp_path / "full" / "seed_1", 7)
    (tmp_path / "hybrid" / "seed_0").mkdir(parents=True)
    (tmp_path / "hybrid" / "seed_0" / "failure.txt").write_text("loss is not finite\n")
    summary = summarize(sweep, tmp_path)
    arms = by_arm(summary)
    assert arms["shared"]["difference"]["seeds"] == [0, 2]
    assert arms["shared"]["difference"]["mean"] == pytest.approx(0.1)
    assert arms["shared"]["seeds"] == [0, 1, 2]
    assert arms["hybrid"] == {
        "arm": "hybrid",
        "changes": {"model.unit": "LG"},
        "seeds": [],
        "sentence": "hybrid: no run of it has a result.",
    }
    reasons = {(run["arm"], run["seed"]): run["reason"] for run in summary["missing"]}
    assert reasons == {
        ("full", 1): "stopped at step 7",
        ("hybrid", 0): "failed: loss is not finite",
        ("hybrid", 1): "not started",
        ("hybrid", 2): "not started",
    }
    assert summary["notes"][0] == "Incomplete: 4 of 9 runs have no result."


def test_an_arm_without_a_common_seed_is_undecided(tmp_path):
    scores = {"full": (2.0, 2.1), "shared": (2.1, 2.2), "hybrid": (None, None, 2.0)}
    sweep = write_sweep(tmp_path, scores=scores)
    summary = summarize(sweep, tmp_path)
    got = by_arm(summary)["hybrid"]
    assert got["difference"]["mean"] is None and got["difference"]["verdict"] == "undecided"
    assert "no seed" in got["sentence"] and "Arms have different seeds" in "".join(summary["notes"])
    assert cells.domain_rows(summary)[3][1] == "2.0000"
    assert [text.get_text() for text in figures.intervals(summary).axes[0].texts] == ["worse"]


def test_a_missing_baseline_leaves_no_differences(tmp_path):
    sweep = write_sweep(tmp_path, scores={"shared": SCORES["shared"]})
    summary = summarize(sweep, tmp_path)
    assert by_arm(summary)["shared"]["difference"] is None
    assert summary["headline"] == "No arm can be compared with the baseline yet."
    assert "no seed in common" in by_arm(summary)["shared"]["sentence"]
    assert any("baseline 'full' has no result" in note for note in summary["notes"])
    assert "bits_per_byte" not in summary["margin"]


def test_a_result_that_is_not_finite_is_missing(tmp_path):
    sweep = write_sweep(tmp_path, scores={**SCORES, "shared": (2.0, math.nan, 2.0)})
    summary = summarize(sweep, tmp_path)
    assert summary["missing"] == [
        {"arm": "shared", "seed": 1, "reason": "bits_per_byte is not finite"}
    ]
    assert by_arm(summary)["shared"]["seeds"] == [0, 2]


def test_verdicts_on_different_bytes_are_withheld(tmp_path):
    sweep = write_sweep(tmp_path)
    path = tmp_path / "full" / "seed_0" / "evaluation.json"
    rows = json.loads(path.read_text())
    rows["code"]["bytes"] += 1
    path.write_text(json.dumps(rows))
    summary = summarize(sweep, tmp_path)
    assert "3,001 bytes in full seed 0; 3,000 bytes in" in summary["withheld"]
    assert summary["headline"].startswith("Verdicts are withheld: held-out text of code differs")
    assert all(arm["difference"] is None for arm in summary["arms"])
    assert "verdict is withheld" in by_arm(summary)["hybrid"]["sentence"]
    assert summary["domains"] == {}


def test_costs_are_those_of_the_arms(tmp_path):
    sweep = write_sweep(tmp_path, experts=2.5)
    (tmp_path / "search.json").write_text(json.dumps({"shared": searched(3.0, "high")}))
    summary = summarize(sweep, tmp_path)
    arms = by_arm(summary)
    attention = sweep.config(sweep.runs()[0]).model.attention
    owner = 2 * 2 * attention.num_kv_heads * attention.head_dim
    cache = {arm: arms[arm]["costs"]["kv_bytes_per_token"] for arm in arms}
    assert cache["shared"] == cache["full"] / 2
    assert cache["full"] == 2 * owner
    # A window of 8 keys in a context of 65536 costs next to nothing.
    assert cache["full"] / 2 < cache["hybrid"] < cache["full"] / 2 * 1.001
    costs = arms["full"]["costs"]
    assert costs["experts_per_token"] == pytest.approx(2.5)
    assert costs["tokens_per_second"] == 100.0
    assert arms["hybrid"]["costs"]["train_flops"] < costs["train_flops"]
    assert arms["shared"]["search"]["factor"] == 3.0 and arms["full"]["search"] is None
    assert any("shared: its best learning rate is at an edge" in n for n in summary["notes"])
    assert summary["budget"]["sentence"].startswith(
        "Arms are matched by training tokens. All had the same training tokens"
    )


def test_other_routings_are_set_against_the_arms_own(tmp_path):
    ways = {"top_1": {"routing": "top_k", "top_k": 1}}
    sweep = write_sweep(tmp_path, small_sweep(base=tiny_config(), inference=ways), experts=2.0)
    assert summarize(sweep, tmp_path)["inference"] == []
    for seed, more in enumerate((0.1, 0.2, 0.3)):
        folder = tmp_path / "shared" / f"seed_{seed}"
        rows = json.loads((folder / "evaluation.json").read_text())
        for domain in rows.values():
            domain["bits_per_byte"] += more
            domain["experts_per_token"] = 1.0
        (folder / "inference").mkdir()
        (folder / "inference" / "top_1.json").write_text(json.dumps(rows))
    own, other = [r for r in summarize(sweep, tmp_path)["inference"] if r["arm"] == "shared"]
    assert (own["way"], other["way"], other["experts_per_token"]) == ("as trained", "top_1", 1.0)
    whole = np.mean([pooled(code) for code in SCORES["shared"]])
    assert other["percent"]["mean"] == pytest.approx(100 * 0.2 / whole)
    # s = 0.1, t(0.975, 2) = 4.302653
    reach = 4.302653 * 0.1 / 3**0.5
    assert other["percent"]["high"] == pytest.approx(100 * (0.2 + reach) / whole, rel=1e-6)


@pytest.mark.parametrize(
    ("file", "record", "message"),
    [
        ("decode", {"tokens_per_second": "x"}, "decode.json: full: tokens_per_second = 'x'"),
        ("decode", {"context": None}, "decode.json: full: context = None"),
        ("search", {"seconds": "x"}, "search.json: full: seconds = 'x': must be a finite number"),
        ("search", {"edge": "left"}, "search.json: full: edge = 'left': must be one of low, high"),
        ("search", {"trials": [{}]}, "search.json: full.trials: lacks factor"),
    ],
)
def test_a_damaged_measurement_is_named(tmp_path, file, record, message):
    sweep = write_sweep(tmp_path)
    whole = {"decode": decoded(1.0), "search": searched(1.0)}[file]
    (tmp_path / f"{file}.json").write_text(json.dumps({"full": whole | record}))
    with pytest.raises(UserError, match=message):
        summarize(sweep, tmp_path)


def test_arms_that_change_several_factors_for_one_reason_are_one_note(tmp_path):
    arms = {
        "full": {"model.unit": "GG"},
        "a": {"model.unit": "Gg", "model.mlp_dim": 32},
        "b": {"model.unit": "LG", "model.mlp_dim": 32},
    }
    sweep = write_sweep(tmp_path, small_sweep(arms=arms, several={"*": "to be cheap."}))
    assert "a, b change several factors: to be cheap." in summarize(sweep, tmp_path)["notes"]
