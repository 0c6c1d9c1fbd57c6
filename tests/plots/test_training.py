"""Figures of a run show the rows that they are given."""

import numpy as np

from lightning_jax import plots
from lightning_jax.infer.readings import TextScore


def test_loss_shades_stages_and_marks_evaluations():
    rows = [
        {"step": n, "tokens": 10 * n, "stage": "ab"[n > 3], "loss": 4 - n / 4} for n in range(1, 7)
    ]
    rows += [{"step": 3, "eval": {"code": {"loss": 3.5}}}, {"step": 5, "loss": None}]
    axes = plots.loss(rows, {"code": {"loss": 2.5}}).axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_array_equal(lines["held out: code"], [(30, 3.5), (60, 2.5)])
    # A straight curve stays as it is when it is smoothed.
    np.testing.assert_allclose(lines["training"][:, 1], [4 - n / 4 for n in range(1, 7)])
    assert [text.get_text() for text in axes.texts] == ["a", "b"]


def test_a_run_without_steps_has_a_figure():
    assert plots.loss([]).axes


def test_the_controller_is_drawn_with_its_target():
    rows = [{"tokens": 10 * n, "top_p": n / 10, "mean_experts": [n, n + 1.0]} for n in (1, 2)]
    rows += [{"step": 2, "eval": {}}]
    left, right = plots.controller({"a": rows, "b": rows}, target=2.5).axes
    assert [line.get_label() for line in left.lines] == ["a", "b"]
    np.testing.assert_allclose(left.lines[0].get_xydata(), [(10, 0.1), (20, 0.2)])
    np.testing.assert_allclose(right.lines[1].get_ydata(), [1.5, 2.5])
    assert set(right.lines[-1].get_ydata()) == {2.5}


def test_the_trade_off_marks_the_top_p_of_the_run():
    scores = {0.2: TextScore(2.0, 1.5, 9), 0.5: TextScore(1.5, 3.0, 9)}
    axes = plots.trade_off(scores, trained=0.5).axes[0]
    curve, marked = axes.lines
    np.testing.assert_allclose(curve.get_xydata(), [(1.5, 2.0), (3.0, 1.5)])
    np.testing.assert_allclose(marked.get_xydata(), [(3.0, 1.5)])
    assert [text.get_text() for text in axes.texts] == ["0.2", "0.5"]


def test_the_losses_of_runs_are_smoothed_alike():
    rows = [{"step": n, "tokens": 10 * n, "loss": 4 - n / 4} for n in range(1, 7)]
    rows += [{"step": 3, "eval": {}}, {"step": 7, "tokens": 70, "loss": None}]
    tokens, loss = plots.smooth_loss(rows)
    np.testing.assert_array_equal(tokens, [10, 20, 30, 40, 50, 60])
    np.testing.assert_allclose(loss, [4 - n / 4 for n in range(1, 7)])
    lines = plots.losses({"a": rows, "b": rows[:3], "none": []}).axes[0].lines
    assert [line.get_label() for line in lines] == ["a", "b", "none"]
    np.testing.assert_allclose(lines[1].get_ydata(), loss[:3])
