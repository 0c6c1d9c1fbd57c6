"""Figures show the numbers that they are given."""

import io
import re

import numpy as np
from matplotlib.image import imread

from lightning_jax import accounting, plots
from lightning_jax.infer.run import TextRouting
from tests.tiny import tiny_model

# Three tokens, two layers of four experts, at most two a token; 4 is an empty slot.
INDEX_RTC = np.array([[[0, 4], [1, 2], [3, 4]], [[0, 1], [0, 2], [3, 4]]])
ROUTING = TextRouting(("a<", "", "\n"), (0, 2), INDEX_RTC, 4)


def test_layers_say_who_keeps_and_who_borrows():
    figure = plots.layers(tiny_model(unit="LGLg", num_units=3))
    said = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    keeps = "keeps the last 8"
    assert said == [keeps, "keeps all", keeps, "borrows from layer 1"]
    assert figure.axes[0].get_title().startswith("LGLg, 3 times")
    strips = [bar.get_width() for bar in figure.axes[0].patches]
    assert strips == [32, 8, 32, 32, 32, 8, 32, 32]


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


def test_costs_are_those_of_accounting():
    model = tiny_model(unit="LG")
    figure = plots.costs({"ours": model}, [64, 128])
    drawn = [axes.lines[0].get_ydata().tolist() for axes in figure.axes]
    assert drawn[0] == [accounting.kv_cache_bytes(model, n) for n in (64, 128)]
    assert drawn[1] == [accounting.attention_flops(model, n) for n in (64, 128)]


def test_experts_are_counted_by_token_and_by_expert():
    top, bottom = plots.experts(ROUTING).axes[:2]
    np.testing.assert_array_equal(top.images[0].get_array(), [[1, 2, 1], [2, 2, 1]])
    assert [bar.get_height() for bar in bottom.patches] == [1.5, 2, 1]
    load = plots.expert_load(ROUTING).axes[0].images[0].get_array()
    np.testing.assert_allclose(load, np.array([[1, 1, 1, 1], [2, 1, 1, 1]]) / 3)


def test_text_is_escaped_and_coloured():
    page = plots.experts_in_text(ROUTING)
    spans = re.findall(r'<span style="background:(#\w{6})" title="(\S+) experts">([^<]*)', page)
    assert spans == [("#faca9e", "1.50", "a&lt;"), ("#ffffff", "1.00", "\n")]


def test_png_is_a_picture():
    picture = imread(io.BytesIO(plots.png(plots.layers(tiny_model()))))
    assert picture.ndim == 3 and picture.std() > 0.05
