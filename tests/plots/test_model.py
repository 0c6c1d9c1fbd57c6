"""Figures of a model show the numbers that they are given."""

import jax.numpy as jnp
import numpy as np

from lightning_jax import accounting, plots
from lightning_jax.ops.mask import Mask
from tests.tiny import tiny_model


def test_layers_say_who_keeps_and_who_borrows():
    figure = plots.layers(tiny_model(unit="LGLg", num_units=3))
    said = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    keeps = "keeps the last 8"
    assert said == [keeps, "keeps all", keeps, "borrows from layer 1"]
    assert figure.axes[0].get_title().startswith("LGLg, 3 times")
    strips = [bar.get_width() for bar in figure.axes[0].patches]
    assert strips == [32, 8, 32, 32, 32, 8, 32, 32]
    assert figure.axes[0].get_xticks().tolist() == [0, 16, 24, 32]


def test_a_window_that_no_layer_has_is_not_marked():
    figure = plots.layers(tiny_model(unit="G"))
    assert figure.axes[0].get_xticks().tolist() == [0, 16, 32]


def test_costs_are_those_of_accounting():
    model = tiny_model(unit="LG")
    figure = plots.costs({"ours": model}, [64, 128])
    drawn = [axes.lines[0].get_ydata().tolist() for axes in figure.axes]
    assert drawn[0] == [accounting.kv_cache_bytes(model, n) for n in (64, 128)]
    assert drawn[1] == [accounting.attention_flops(model, n) for n in (64, 128)]


def test_masks_are_drawn_with_the_positions_of_their_queries():
    segments = jnp.array([[1, 1, 2]])
    packed = Mask(query_segments_BT=segments, key_segments_BS=segments)
    whole, late = plots.masks({"packed": packed, "late": Mask(window=2, query_offset=2)}, 3).axes
    assert whole.get_title() == "packed"
    np.testing.assert_array_equal(whole.images[0].get_array(), [[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(late.images[0].get_array(), [[0, 1, 1]])
    assert late.get_ylim() == (2.5, 1.5)


def test_slots_have_their_positions_and_empty_ones_have_none():
    axes = plots.slots(np.array([[0, -1], [0, 1], [2, 1]])).axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "0", (0, 1): "0", (1, 1): "1", (0, 2): "2", (1, 2): "1"}
    shades = axes.images[0].get_array()
    assert shades.mask[0, 1] and shades[2, 0] > shades[2, 1]


def test_slopes_are_those_of_powers():
    times = {f"{power}": {n: 1e-6 * n**power for n in (64, 128, 512)} for power in (1, 2)}
    labels = [line.get_label() for line in plots.slopes(times).axes[0].lines]
    assert labels == ["1: slope 1.00", "2: slope 2.00"]
