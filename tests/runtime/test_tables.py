import io

from lightning_jax.runtime import tables


def test_every_cell_is_shown_as_it_is():
    out = io.StringIO()
    tables.print_table([["name", "[b]"], ["x" * 60, 82.8], ["y", None]], "A [title]", file=out)
    text = out.getvalue()
    assert all(part in text for part in ("A [title]", "[b]", "x" * 60, "82.8", "None"))
