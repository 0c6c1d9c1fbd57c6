"""Writes what is generated in docs/: `make docs-reference`, or python -m docs.tools.generate."""

from __future__ import annotations

from pathlib import Path

from docs.tools import api, config_fields, picture

DOCS = Path(__file__).resolve().parents[1]
# Compared with the code by tests/docs/test_reference.py.
PAGES = {"config.md": config_fields.page, "api.md": api.page}
# Its curves depend on the version of matplotlib.
PICTURES = {"img/layers.svg": picture.layers}

if __name__ == "__main__":
    for name, text in (PAGES | PICTURES).items():
        (DOCS / name).write_text(text(), encoding="utf-8")
