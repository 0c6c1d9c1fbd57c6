"""Figures of a text's experts show the numbers that they are given."""

import re

import numpy as np

from lightning_jax import plots
from lightning_jax.infer.readings import TextRouting
from lightning_jax.plots.routing import piece_kinds

# Three tokens, two layers of four experts, at most two a token; 4 is an empty slot.
INDEX_RTC = np.array([[[0, 4], [1, 2], [3, 4]], [[0, 1], [0, 2], [3, 4]]])
ROUTING = TextRouting(("a<", "", "\n"), (0, 2), INDEX_RTC, 4)


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


def test_layers_have_their_shares_of_the_tokens_of_all_texts():
    axes = plots.expert_counts([ROUTING, ROUTING]).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), np.array([[2, 1], [1, 2]]) / 3)
    np.testing.assert_allclose(axes.lines[0].get_xdata(), np.array([4, 5]) / 3 - 1)


def test_kinds_of_tokens_have_their_means():
    axes = plots.experts_by_kind([ROUTING, ROUTING]).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    means = [bar.get_width() for bar in axes.patches]
    assert dict(zip(labels, means, strict=True)) == {
        "line end (2)": 1,
        "other (4)": 1.75,
    }


def test_a_word_may_be_of_several_tokens():
    pieces = ["def", " my", "_", "in", "(", "x", ",", " 12", "):", "\n    ", " ", "", "if", "i"]
    assert piece_kinds(pieces) == [
        *("keyword", "name", "rest of a name", "rest of a name", "punctuation", "name"),
        *("punctuation", "number", "punctuation", "line end", "white space", "other"),
        *("keyword", "rest of a name"),
    ]


def test_domains_have_their_means_by_layer_and_over_all():
    second = TextRouting(("x",), (0, 2), np.array([[[0, 1]], [[0, 4]]]), 4)
    axes = plots.experts_by_domain({"code": [ROUTING, second], "prose": [second]}).axes[0]
    expected = np.array([[6 / 4, 2], [6 / 4, 1], [6 / 4, 1.5]])
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["layer 0", "layer 2", "all layers"]


def test_positions_are_taken_together_by_powers_of_two():
    axes = plots.experts_by_position({"code": [ROUTING, ROUTING]}).axes[0]
    # Means over layers: 1.5, 2, 1; positions 2 and 3 are one point.
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [(1, 1.5), (2, 1.5)])


def test_texts_may_be_joined():
    both = TextRouting.joined([ROUTING, ROUTING])
    assert both.pieces == ROUTING.pieces * 2
    np.testing.assert_array_equal(both.load_RE, 2 * ROUTING.load_RE)
