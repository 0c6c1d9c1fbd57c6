"""Tables on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_jax.runtime import output

# Characters per line of a table that goes to a file: enough that nothing is cut.
WIDE = 160


def print_table(
    rows: Sequence[Sequence[object]], title: str, *, file: TextIO | None = None
) -> None:
    """Prints rows, header first, to `file` (standard error by default)."""
    output.guard()
    console = Console(file=file or sys.stderr)
    if not console.is_terminal:
        console = Console(file=file or sys.stderr, width=WIDE)
    table = Table(title=escape(title), title_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(escape(str(name)), justify="right" if index else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)
