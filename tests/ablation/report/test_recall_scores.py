"""Recall is compared over the cells that all arms have."""

import json

import pytest

from lightning_jax.ablation.report import recall_scores
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import small_sweep, write_sweep


def cell(length, exact, windows=1):
    return {"length": length, "windows": windows, "depth": 0.5, "exact": exact, "examples": 20}


def make(tmp_path, cells_of):
    sweep = small_sweep()
    write_sweep(tmp_path, sweep)
    for run in sweep.runs():
        path = run.folder(tmp_path) / "evaluation.json"
        rows = json.loads(path.read_text())
        cells = cells_of(run)
        rows["docs"]["recall"] = {"task": "recall:passkey", "exact": 0.5, "cells": cells}
        path.write_text(json.dumps(rows))
    found = {arm: {seed: {} for seed in sweep.seeds} for arm in sweep.arms}
    return recall_scores.summarize(sweep, found, tmp_path)


def test_arms_are_compared_on_common_cells(tmp_path):
    exact = {"full": 0.9, "shared": 0.9, "hybrid": 0.2}

    def cells(run):
        longest = 32 if run.arm == "hybrid" else 64
        noise = 0.01 * run.seed if run.arm == "full" else 0
        return [cell(16, exact[run.arm] + noise), cell(longest, 0.0, windows=2)]

    found = make(tmp_path, cells)["docs"]
    assert found["common"] == 1
    assert found["arms"]["full"]["mean"] == pytest.approx(0.91)
    assert found["differences"]["hybrid"]["mean"] == pytest.approx(-0.71)
    assert found["differences"]["hybrid"]["verdict"] == "worse"
    assert found["is_shown"]
    grid = found["grids"]["full"]
    assert grid[0] == {**cell(16, pytest.approx(0.91)), "examples": 60}
    assert [entry["length"] for entry in grid] == [16, 64]


def test_without_common_cells_nothing_is_compared(tmp_path):
    lengths = {"full": 16, "shared": 32, "hybrid": 64}
    found = make(tmp_path, lambda run: [cell(lengths[run.arm], 0.5)])["docs"]
    assert (found["common"], found["arms"], found["differences"]) == (0, {}, {})
    assert not found["is_shown"]


def test_a_task_that_could_not_be_measured_is_left_out(tmp_path):
    sweep = write_sweep(tmp_path)
    path = sweep.runs()[0].folder(tmp_path) / "evaluation.json"
    rows = json.loads(path.read_text())
    rows["docs"]["recall"] = {"task": "recall:copy", "no_exact": "too long"}
    path.write_text(json.dumps(rows))
    assert recall_scores.summarize(sweep, {"full": {0: {}}}, tmp_path) == {}


def test_a_damaged_cell_is_named(tmp_path):
    with pytest.raises(UserError, match=r"docs.recall.cells: exact = 1.5: must be"):
        make(tmp_path, lambda run: [cell(16, 1.5)])
