"""The picture of README: which layer of the quickstart owns keys and values, borrows, slides."""

from __future__ import annotations

import io

import matplotlib

from configs import quickstart
from lightning_jax import plots
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build


def layers() -> str:
    """The text of docs/img/layers.svg; the same bytes for the same versions."""
    figure = plots.layers(build(RunConfig, quickstart.get_config()).model)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "lightning_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
