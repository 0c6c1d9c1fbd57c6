"""HTML pages that are one file: pictures inside, nothing from elsewhere, for phone and print."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #111; background: #fff; overflow-wrap: break-word; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  th, td { padding: .2rem .35rem; font-size: .85rem; white-space: normal; }
}
@media print {
  body { margin: 0; max-width: none; } pre { white-space: pre-wrap; }
  h2 { break-after: avoid; } img, pre { break-inside: avoid; }
  * { print-color-adjust: exact; }
}
"""


def document(title: str, body: str, style: str = "") -> str:
    """Returns a whole page.

    Args:
      title: plain text.
      body: HTML.
      style: CSS after `STYLE`.
    """
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>
<body>
<h1>{html.escape(title)}</h1>
{body}
</body>
</html>
"""


def table(rows: Sequence[Sequence[object]]) -> str:
    """Returns the rows, header first, as a table; cells are plain text or numbers."""

    def line(cells: Sequence[object], tag: str) -> str:
        shown = (html.escape(str(cell)) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

    header, *rest = rows
    return "\n".join(
        ["<table>", line(header, "th"), *[line(row, "td") for row in rest], "</table>"]
    )


def picture(png: bytes, description: str) -> str:
    """Returns a PNG with its description, inside the page."""
    data = base64.b64encode(png).decode()
    return f'<p><img alt="{html.escape(description)}"\n src="data:image/png;base64,{data}"></p>'


def listing(text: str) -> str:
    """Returns plain text as it is, in a fixed-width font."""
    return f"<pre>{html.escape(text)}</pre>"
