"""Files and tables."""

import io

from matplotlib.image import imread

from lightning_jax import plots
from tests.tiny import tiny_model


def test_png_is_a_picture():
    picture = imread(io.BytesIO(plots.png(plots.layers(tiny_model()))))
    assert picture.ndim == 3 and picture.std() > 0.05


def test_a_table_has_its_header_and_escapes():
    page = plots.table([["", "b<c"], ["x", 1.5]])
    assert page.count("<tr>") == 2 and page.count("<th ") == page.count("<td ") == 2
    assert "b&lt;c" in page and page.index("b&lt;c") < page.index("1.5")
