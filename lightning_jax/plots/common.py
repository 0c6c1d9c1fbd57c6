"""What all figures share: colours, files, tables."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00", BLACK)


def png(figure: Figure, *, dpi: int = 110) -> bytes:
    """Returns the picture as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def table(rows: Sequence[Sequence[object]]) -> str:
    """Returns HTML: a table of rows, header first; numbers stand on the right."""
    cell = '<{0} style="text-align:{1};padding:2px 12px 2px 0">{2}</{0}>'
    lines = []
    for number, row in enumerate(rows):
        kind = "td" if number else "th"
        sides = ("right" if column else "left" for column in range(len(row)))
        cells = (
            cell.format(kind, side, html.escape(str(value)))
            for side, value in zip(sides, row, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"
