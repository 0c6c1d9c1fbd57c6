"""A domain is to be read where it tells arms apart better than seeds do."""

import json

import pytest

from lightning_jax.ablation.report import domains
from lightning_jax.ablation.results import METRIC
from tests.ablation.fake_runs import small_sweep


def rows_of(scores):
    return {
        arm: {
            seed: {"domains": {name: {METRIC: x, "bytes": 7} for name, x in values.items()}}
            for seed, values in enumerate(by_seed)
        }
        for arm, by_seed in scores.items()
    }


def test_a_domain_that_seeds_move_more_than_arms_is_not_shown(tmp_path):
    rows = rows_of(
        {
            "full": [{"code": 2.0, "docs": 3.0}, {"code": 2.1, "docs": 2.0}],
            "hybrid": [{"code": 1.0, "docs": 2.0}, {"code": 1.1, "docs": 3.0}],
            "shared": [],
        }
    )
    found = domains.summarize(small_sweep(), rows, tmp_path)
    assert found["code"]["is_shown"] and not found["docs"]["is_shown"]
    assert found["code"]["arms"] == {"full": pytest.approx(2.05), "hybrid": pytest.approx(1.05)}
    assert found["code"]["differences"]["hybrid"]["verdict"] == "better"
    assert found["code"]["bytes"] == 7
    assert found["code"]["signal_to_checkpoint_noise"] is None


def test_noise_of_checkpoints_is_about_their_line(tmp_path):
    rows = rows_of({"full": [{"code": 2.0}], "hybrid": [{"code": 1.0}], "shared": []})
    values = [9.0, 3.0, 2.9, 2.8, 2.7, 2.6]
    wobbling = [9.0, 3.1, 2.8, 2.9, 2.6, 2.7]
    for arm, evaluations in (("full", values), ("hybrid", wobbling)):
        folder = tmp_path / arm / "seed_0"
        folder.mkdir(parents=True)
        lines = [{"step": 1, "eval": {"code": {METRIC: value}}} for value in evaluations]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    ratio = domains.summarize(small_sweep(), rows, tmp_path)["code"]["signal_to_checkpoint_noise"]
    # The last five of the second run are 0.08, -0.12, 0.08, -0.12, 0.08 off their line, of the
    # first 0. A difference of 1 has a variance over arms of 1/2, of which noise adds its own.
    variance = ((3 * 0.08**2 + 2 * 0.12**2) / 3) / 4
    assert ratio == pytest.approx(((0.5 - variance) / variance) ** 0.5)
