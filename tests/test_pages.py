"""Pages hold everything themselves and show text as text."""

import base64
import re

from lightning_jax import pages


def test_a_page_escapes_its_title_and_fits_a_phone():
    page = pages.document("a <b> & c", "<p>x</p>", "p { color: red; }")
    assert page.startswith("<!doctype html>") and page.count("a &lt;b&gt; &amp; c") == 2
    assert "width=device-width" in page and "@media print" in page
    assert page.index("@media print") < page.index("p { color: red; }") < page.index("<p>x</p>")


def test_cells_and_listings_are_plain_text():
    table = pages.table([["name", "n<"], ["a&b", 1]])
    assert table.count("<th>") == 2 and "<td>a&amp;b</td><td>1</td>" in table
    assert pages.listing("x < 1") == "<pre>x &lt; 1</pre>"


def test_a_picture_is_inside_the_page():
    picture = pages.picture(b"png", 'a "quoted" one')
    assert base64.b64decode(re.search(r"base64,([^\"]*)", picture)[1]) == b"png"
    assert "a &quot;quoted&quot; one" in picture
