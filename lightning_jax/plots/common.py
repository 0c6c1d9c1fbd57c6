"""What all figures share: colours and files."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00", BLACK)


def png(figure: Figure, *, dpi: int = 110) -> bytes:
    """Returns the picture as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()
