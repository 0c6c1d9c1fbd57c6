"""The grid of recall shows each cell where it belongs."""

import numpy as np

from lightning_jax import plots


def shown(figure):
    axes = figure.axes[0]
    return axes, np.ma.filled(axes.images[0].get_array(), np.nan)


def test_depths_are_rows_and_lengths_columns_with_the_window_between():
    rows = [
        {"length": int(32 * n), "windows": n, "depth": depth, "exact": n * depth / 4}
        for n in (2, 0.5, 4, 1)
        for depth in (1.0, 0.5)
    ]
    axes, exact_DL = shown(plots.recall_grid(rows, title="recall:passkey"))
    np.testing.assert_allclose(exact_DL, np.outer([0.5, 1], [0.5, 1, 2, 4]) / 4)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "32", "64", "128"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["50%", "100%"]
    [line] = axes.lines
    assert list(line.get_xdata()) == [1.5, 1.5]
    # One window is named, and each cell has its number.
    assert [text.get_text() for text in axes.texts][-2:] == ["100%", "one window"]


def test_runs_are_averaged_and_missing_cells_are_empty():
    first = [{"length": 20, "windows": 1, "pairs": 4, "exact": 0.5}]
    second = [{"length": 20, "windows": 1, "pairs": 4, "exact": 1.0}]
    second += [{"length": 40, "windows": 2, "pairs": 9, "exact": 0.25}]
    axes, exact_DL = shown(plots.recall_grid(first + second))
    np.testing.assert_allclose(exact_DL, [[0.75, 0.25]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["20\n4 pairs", "40\n9 pairs"]
    assert not axes.get_yticks().size
    passkey = [{"length": 9, "windows": 1, "depth": 0.0, "exact": 1.0}]
    passkey += [{"length": 18, "windows": 2, "depth": 0.5, "exact": 0.5}]
    _, exact_DL = shown(plots.recall_grid(passkey))
    np.testing.assert_array_equal(exact_DL, [[1.0, np.nan], [np.nan, 0.5]])
