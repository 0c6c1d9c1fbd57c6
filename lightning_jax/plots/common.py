"""What all figures share: colours and files."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axis import Axis
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00", BLACK)


def name_pieces(axis: Axis, pieces: Sequence[str], *, rotation: int = 90) -> None:
    """Labels the ticks 0, 1, 2, ... of an axis with the texts of tokens."""
    labels = [repr(piece)[1:-1] for piece in pieces]
    axis.set_ticks(range(len(labels)), labels, rotation=rotation, family="monospace", fontsize=8)


def png(figure: Figure, *, dpi: int = 110) -> bytes:
    """Returns the picture as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()
