"""Figures of where tokens look show the weights that they are given."""

import numpy as np
import pytest

from lightning_jax import plots
from lightning_jax.config.errors import UserError
from lightning_jax.infer.readings import TextAttention

# Layers 1 and 4, two heads, three tokens.
PROBS_LNTS = np.tril(np.arange(1.0, 37).reshape(2, 2, 3, 3))
PROBS_LNTS /= PROBS_LNTS.sum(-1, keepdims=True) * 2
ATTENTION = TextAttention(("a", "\n", "b"), (1, 4), PROBS_LNTS)


def test_a_map_is_that_of_its_layer_and_head():
    axes = plots.attention_map(ATTENTION, 4, 1).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), PROBS_LNTS[1, 1])
    assert axes.get_title() == "layer 4, head 1"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "\\n", "b"]
    mean = plots.attention_map(ATTENTION, 1).axes[0].images[0].get_array()
    np.testing.assert_allclose(mean, PROBS_LNTS[0].mean(0))


def test_all_heads_have_a_panel():
    panels = plots.attention_heads(ATTENTION).axes
    assert [axes.get_title() for axes in panels] == ["head 0", "head 1", "", ""]
    np.testing.assert_allclose(panels[3].images[0].get_array(), PROBS_LNTS[1, 1])


def test_a_layer_or_head_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="layer = 0: must be one of 1, 4"):
        plots.attention_map(ATTENTION, 0)
    with pytest.raises(UserError, match="head = 2: must be from 0 to 1"):
        plots.attention_map(ATTENTION, 1, 2)


def test_a_sink_takes_the_rest():
    np.testing.assert_allclose(ATTENTION.sink_LNT, 0.5)
