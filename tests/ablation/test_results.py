"""A run's row is what its folder says, pooled over domains."""

import csv
import dataclasses
import json
import math

import pytest

from lightning_jax import accounting
from lightning_jax.ablation import results
from lightning_jax.ablation.results import Run
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import VOCAB, domain, small_sweep, write_run

RUN = Run("shared", 1)


def finished(tmp_path, **scores):
    write_run(small_sweep().config(RUN), tmp_path, **scores)
    return results.run_row(RUN, tmp_path)


def test_domains_are_pooled_by_bytes_for_bits_and_by_tokens_for_loss(tmp_path):
    row = finished(tmp_path, code=1.0, docs=2.0)
    assert row["bits_per_byte"] == pytest.approx((3000 * 1 + 500 * 2) / 3500)
    assert row["loss"] == pytest.approx((3000 * 1 + 500 * 2) * math.log(2) / 1000)
    # The two say the same of the same text.
    assert row["loss"] * row["tokens"] == pytest.approx(
        row["bits_per_byte"] * row["bytes"] * math.log(2)
    )
    assert row["domains"]["docs"]["bits_per_byte"] == 2.0
    assert (row["arm"], row["seed"], row["experts_per_token"]) == ("shared", 1, None)


def test_speed_leaves_compilation_out_and_seconds_do_not(tmp_path):
    row = finished(tmp_path, steps=20)
    assert row["tokens_per_second"] == 100.0
    assert row["seconds"] == pytest.approx(100 / 10 + 19 * 100 / 100)


def test_a_training_costs_what_its_config_says(tmp_path):
    row = finished(tmp_path)
    # 196 and 49 steps of 8 x 512 tokens.
    assert row["train_tokens"] == 245 * 4096
    model = dataclasses.replace(small_sweep().config(RUN).model, vocab_size=VOCAB)
    one = accounting.flops_per_token(model, seq_len=512)
    assert row["train_flops"] == pytest.approx(245 * 4096 * one)


def test_the_busiest_expert_is_that_of_the_last_steps(tmp_path):
    assert finished(tmp_path)["load_max_over_mean"] is None
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 20
    loads = [[9.0, 9.0]] * 18 + [[1.0, 2.0], [2.0, 3.0]]
    for row, load in zip(steps, loads, strict=True):
        row["load_max_over_mean"] = load
    path.write_text("".join(json.dumps(row) + "\n" for row in steps))
    assert results.run_row(RUN, tmp_path)["load_max_over_mean"] == pytest.approx(2.0)
    steps[-1]["load_max_over_mean"] = "much"
    path.write_text("".join(json.dumps(row) + "\n" for row in steps))
    with pytest.raises(UserError, match="load_max_over_mean = 'much': must be a list"):
        results.run_row(RUN, tmp_path)


def test_a_run_without_logged_steps_has_no_speed(tmp_path):
    finished(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    row = results.run_row(RUN, tmp_path)
    assert row["tokens_per_second"] is None and row["seconds"] == 0


def test_collect_takes_the_finished_runs_in_order(tmp_path):
    sweep = small_sweep()
    runs = sweep.runs()
    for run in (runs[4], runs[1]):
        write_run(sweep.config(run), run.folder(tmp_path))
    found = [(row["arm"], row["seed"]) for row in results.collect(runs, tmp_path)]
    assert found == [("shared", 0), ("shared", 1)]


def test_results_are_written_whole_with_the_columns_of_every_row(tmp_path):
    rows = [
        {"arm": "a", "domains": {"x": {"loss": 1}}},
        {"arm": "b", "domains": {"y": {"loss": 2}}},
    ]
    results.write_results(tmp_path, rows)
    results.write_results(tmp_path, rows)
    with open(tmp_path / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert table[1] == {"arm": "b", "domains/x/loss": "", "domains/y/loss": "2"}
    assert [
        json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()
    ] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.jsonl"]
    results.write_results(tmp_path, [])
    assert (tmp_path / "results.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("evaluation.json", "{", "evaluation.json: not JSON"),
        ("evaluation.json", '{"code": {"loss": 1}}', "not an evaluation"),
        ("evaluation.json", "[]", "must be a JSON object"),
        ("config.json", "{}", "config field seed is missing"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, name, text, message):
    finished(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        results.run_row(RUN, tmp_path)


def test_a_run_without_config_is_named(tmp_path):
    finished(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: no such file"):
        results.run_row(RUN, tmp_path)


def test_recall_tasks_are_no_part_of_the_whole(tmp_path):
    text, task = domain(2.0, 900, 3000, None), {**domain(5.0, 100, 300, None), "recall": {}}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"code": text, "copy": task}))
    both = results.held_out(path)
    assert both["bits_per_byte"] == pytest.approx(2.0) and both["bytes"] == 3000
    assert list(both["domains"]) == ["code", "copy"]
    path.write_text(json.dumps({"copy": task}))
    assert results.held_out(path)["bits_per_byte"] == pytest.approx(5.0)
