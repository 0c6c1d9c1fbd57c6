"""Curves are window means, and differences are taken seed by seed."""

import json

import numpy as np

from lightning_jax.ablation.report import curves
from lightning_jax.ablation.results import Run


def log(folder, losses):
    folder.mkdir(parents=True)
    rows = [{"step": i, "tokens": 10 * i, "loss": loss} for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_are_means_of_even_windows(tmp_path):
    runs = [Run("a", 0), Run("a", 4)]
    log(runs[0].folder(tmp_path), np.arange(80.0))
    log(runs[1].folder(tmp_path), np.arange(80.0) + 2)
    tokens, losses = curves.curves(runs, tmp_path)["a"]
    assert list(losses) == [0, 4]
    np.testing.assert_allclose(tokens, np.arange(10, 800, 20))
    np.testing.assert_allclose(losses[0], np.arange(0.5, 80, 2))
    np.testing.assert_allclose(losses[4] - losses[0], 2)


def test_a_curve_ends_with_its_shortest_seed_and_gaps_are_bridged(tmp_path):
    runs = [Run("a", 0), Run("a", 1), Run("b", 0)]
    log(runs[0].folder(tmp_path), [4.0, 3.0, 2.0, 1.0])
    log(runs[1].folder(tmp_path), [4.0, None])
    found = curves.curves(runs, tmp_path)
    assert list(found) == ["a"]
    tokens, losses = found["a"]
    assert tokens.tolist() == [5.0]
    assert [loss.tolist() for loss in losses.values()] == [[4.0], [4.0]]


def test_pairs_are_of_common_seeds_and_common_tokens():
    tokens = np.arange(1.0, 5.0)
    found = {
        "base": (tokens, {0: np.ones(4), 1: np.full(4, 2.0)}),
        "longer": (2 * tokens, {1: np.full(4, 2.5), 7: np.zeros(4)}),
        "stranger": (tokens, {9: np.ones(4)}),
    }
    at, difference = curves.paired(found, "longer", "base")
    assert at.tolist() == [2.0, 4.0] and difference.tolist() == [[0.5, 0.5]]
    assert curves.paired(found, "stranger", "base") is None
    assert curves.paired(found, "longer", "lost") is None
