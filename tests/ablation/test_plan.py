"""What a sweep will take is known, or said to be unknown."""

import json

import pytest

from lightning_jax.ablation import budget, plan
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import searched, small_sweep, write_run
from tests.ablation.test_budget import routed_sweep, trainer
from tests.tiny import tiny_config


def dense_sweep(**changes):
    base = tiny_config(model__num_units=1, model__vocab_size=64, model__moe__num_experts=0)
    return small_sweep(**{"base": base, "seeds": (0, 1), **changes})


def by_arm(sweep, root):
    return {row["arm"]: row for row in plan.rows(sweep, root)}


def finish(sweep, root, only=()):
    for run in sweep.runs(only):
        write_run(sweep.config(run), run.folder(root))


def test_a_new_sweep_has_tokens_and_flops_but_no_hours(tmp_path):
    found = by_arm(dense_sweep(), tmp_path)
    assert list(found) == ["full", "shared", "hybrid"]
    full, shared = found["full"], found["shared"]
    # 196 steps and 49, of 4,096 tokens.
    assert full["tokens"] == 245 * 4096 and full["tokens_left"] == 2 * full["tokens"]
    assert full["runs"] == 2 and full["finished"] == full["trials"] == 0
    assert full["train_flops"] > shared["train_flops"] > 0
    assert full["kv_bytes_per_token"] == 2 * shared["kv_bytes_per_token"]
    assert full["seconds"] is full["seconds_left"] is None


def test_finished_runs_tell_the_time_of_those_that_are_left(tmp_path):
    sweep = dense_sweep(scaling=[0.5])
    finish(sweep, tmp_path, ["full"])
    (tmp_path / "full" / "seed_1" / "evaluation.json").unlink()
    found = by_arm(sweep, tmp_path)
    # Ten seconds of compilation and nineteen at one second each.
    assert found["full"]["finished"] == 1 and found["full"]["seconds_left"] == pytest.approx(29)
    assert found["full"]["train_flops_left"] == pytest.approx(found["full"]["train_flops"])
    # The baseline with half of its tokens takes half as long.
    half = found["full@0.5"]
    assert half["tokens"] == (98 + 24) * 4096
    assert half["seconds_left"] == pytest.approx(2 * 29 * 122 / 245)
    assert not half["is_guess"]
    # An arm without a run computes as fast as the others.
    other = found["shared"]
    share = other["train_flops"] / found["full"]["train_flops"]
    assert other["is_guess"] and other["seconds_left"] == pytest.approx(2 * 29 * share)


def test_trials_of_a_search_count_until_they_are_done(tmp_path):
    sweep = dense_sweep(search={"trials": 4, "tokens": 0.5})
    full = by_arm(sweep, tmp_path)["full"]
    assert full["trials"] == 4 and full["tokens_left"] == 4 * full["tokens"]
    (tmp_path / "search.json").write_text(json.dumps({"full": searched(1.0)}))
    trial = tmp_path / "search" / "shared" / "trial_0"
    trial.mkdir(parents=True)
    (trial / "evaluation.json").write_text("{}")
    found = by_arm(sweep, tmp_path)
    assert found["full"]["trials"] == 0 and found["full"]["tokens_left"] == 2 * full["tokens"]
    assert found["shared"]["trials"] == 3 and found["hybrid"]["trials"] == 4


def test_what_waits_for_a_calibration_is_unknown(tmp_path, capsys):
    sweep = routed_sweep()
    found = by_arm(sweep, tmp_path)
    assert found["fixed"]["tokens"] is found["fixed"]["train_flops_left"] is None
    assert found["wide"]["tokens"] < found["held"]["tokens"]
    plan.print_plan(sweep, tmp_path)
    words = capsys.readouterr().err
    assert "unknown tokens" in words and "calibrations of fixed: 9.6 K tokens" in words
    budget.scales(sweep, tmp_path, train=trainer())
    found = by_arm(sweep, tmp_path)
    assert found["fixed"]["tokens"] < found["held"]["tokens"]
    assert found["fixed"]["train_flops"] == pytest.approx(found["held"]["train_flops"], rel=0.01)
    # The window of 8 makes it 800 tokens per second.
    assert found["fixed"]["seconds"] == found["fixed"]["tokens"] / 800


def test_the_plan_is_printed_with_its_sums(tmp_path, capsys):
    sweep = dense_sweep(search={"trials": 4})
    assert plan.print_plan(sweep, tmp_path) == plan.rows(sweep, tmp_path)
    words = capsys.readouterr().err
    assert sweep.question in words and "2 + 4 trials" in words
    assert "Left: 6 of 6 runs and 12 trials, 18.1 M tokens" in words
    assert "unknown one after another" in words and "Hours are unknown until one run" in words
    finish(sweep, tmp_path)
    plan.print_plan(sweep, tmp_path)
    words = capsys.readouterr().err
    assert "Left: 0 of 6 runs" in words and "unknown" not in words


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    sweep = dense_sweep()
    run = next(iter(sweep.runs()))
    write_run(sweep.config(run), tmp_path / "other" / "seed_0")
    with pytest.raises(UserError, match="this workdir has a run 'other/seed_0', which is not in"):
        plan.rows(sweep, tmp_path)
