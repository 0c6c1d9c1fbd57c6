"""Runs inferred with another routing than their own: measured once, compared by seed."""

import json

import pytest

from lightning_jax.ablation import inference
from lightning_jax.ablation.results import Run
from lightning_jax.config.errors import UserError
from lightning_jax.config.routing import EvalRouting
from tests.ablation.fake_runs import domain, small_sweep, write_run

WAYS = {
    "top_1": EvalRouting(routing="top_k", top_k=1),
    "sparse": EvalRouting(routing="top_p", top_p=0.2),
}


@pytest.fixture
def measured(monkeypatch):
    """Replaces evaluations, which cost 0.1 bits more per way; returns what was asked for."""
    asked = []

    def fake(folder, options):
        asked.append((folder.split("/")[-2], options.routing))
        extra = 0.1 * (1 + [*WAYS.values()].index(options.routing))
        return {"domains": {"code": domain(2 + extra, 900, 3000, 1.0)}}

    monkeypatch.setattr(inference, "evaluate_run", fake)
    return asked


def finished(root, seeds=(0, 1)):
    sweep = small_sweep(seeds=seeds)
    runs = [run for run in sweep.runs() if run.arm != "hybrid"]
    for run in runs:
        experts = 2.5 if run.arm == "full" else None
        write_run(sweep.config(run), run.folder(root), code=2, docs=2, experts=experts)
        result = {"code": domain(2 + run.seed, 900, 3000, experts)}
        (run.folder(root) / "evaluation.json").write_text(json.dumps(result))
    return runs


def test_each_way_is_measured_once(tmp_path, measured):
    run = finished(tmp_path, seeds=(0,))[0]
    for _ in range(2):
        inference.evaluate(run, run.folder(tmp_path), WAYS)
    assert measured == [("full", way) for way in WAYS.values()]
    (run.folder(tmp_path) / "inference" / "top_1.json").unlink()
    inference.evaluate(run, run.folder(tmp_path), WAYS)
    assert len(measured) == 3


def test_a_table_compares_ways_by_seed_and_leaves_out_dense_arms(tmp_path, measured):
    runs = finished(tmp_path)
    for run in runs[:1]:
        inference.evaluate(run, run.folder(tmp_path), WAYS)
    own, top_1, sparse = inference.table(runs, tmp_path, [*WAYS, "never"])
    assert own["arm"] == top_1["arm"] == sparse["arm"] == "full"
    assert [row["way"] for row in (own, top_1, sparse)] == [inference.OWN, "top_1", "sparse"]
    assert own["seeds"] == [0, 1] and own["more"] == [0, 0] and own["experts_per_token"] == 2.5
    assert top_1["seeds"] == [0] and top_1["experts_per_token"] == 1
    assert top_1["more"] == pytest.approx([0.1]) and sparse["more"] == pytest.approx([0.2])
    assert own["bits_per_byte"] == pytest.approx(2.5)


def test_other_text_is_refused(tmp_path, measured):
    runs = finished(tmp_path, seeds=(0,))
    path = runs[0].folder(tmp_path) / "inference" / "top_1.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"code": domain(2.0, 900, 2999, 1.0)}))
    with pytest.raises(UserError, match=r"full seed 0: top_1 was measured on 2,999 bytes .*3,000"):
        inference.table(runs, tmp_path, ["top_1"])
    path.write_text(json.dumps({"code": domain(2.0, 900, 3000, None)}))
    with pytest.raises(UserError, match="full seed 0: top_1 has no experts_per_token"):
        inference.table(runs, tmp_path, ["top_1"])


def test_a_run_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError):
        inference.evaluate(Run("a", 0), tmp_path / "a" / "seed_0", WAYS)
