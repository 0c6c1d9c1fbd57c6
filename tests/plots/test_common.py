"""Files of figures."""

import io

from matplotlib.image import imread

from lightning_jax import plots
from tests.tiny import tiny_model


def test_png_is_a_picture():
    picture = imread(io.BytesIO(plots.png(plots.layers(tiny_model()))))
    assert picture.ndim == 3 and picture.std() > 0.05
