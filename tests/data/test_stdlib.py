"""Docstrings of the standard library: what they are, and that they are parsed once."""

import pytest

from lightning_jax.data import cache, stdlib
from lightning_jax.data.index import IndexStore


def test_docstrings():
    code = '''"""Top."""
def f():
    """In f.

        indented
    last
    """
    if f:
        class C:
            async def g(self):
                """In g."""
    try:
        pass
    except Exception:
        def h(): "In h."
    return lambda: """not one"""
'''
    assert stdlib.docstrings(code) == "Top.\n\nIn f.\n\n    indented\nlast\n\nIn g.\n\nIn h."
    assert stdlib.docstrings("x = 1") == stdlib.docstrings("print 'old'") == ""
    assert stdlib.docstrings("\0") == stdlib.docstrings('"\\ud800"') == ""


@pytest.fixture
def library(tmp_path, monkeypatch):
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "a.py").write_text('"""Of a."""')
    (folder / "b.py").write_text("x = 1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def read(folder):
    docs = stdlib.docs(str(folder), IndexStore(cache.user_folder()))
    return [docs.read(i) for i in range(len(docs))]


def kept_in(tmp_path):
    return list((tmp_path / "cache" / "lightning_jax").glob("stdlib_docs_*"))


def test_docstrings_are_parsed_again_only_when_a_module_changes(library, tmp_path, monkeypatch):
    assert read(library) == ["Of a.", ""]
    assert len(kept_in(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(stdlib, "docstrings", lambda code: pytest.fail("parsed again"))
        assert read(library) == ["Of a.", ""]
    (library / "b.py").write_text('"""Of b, at last."""')
    assert read(library) == ["Of a.", "Of b, at last."]
    assert len(kept_in(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["", "[1, 2]", '["one"]', "{}", '["Of a.'])
def test_damaged_cache_is_written_anew(library, tmp_path, damage):
    read(library)
    (kept,) = kept_in(tmp_path)
    whole = kept.read_bytes()
    kept.write_text(damage)
    assert read(library) == ["Of a.", ""]
    assert kept.read_bytes() == whole


def test_without_a_folder_for_it_nothing_is_kept(library, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for home in (str(tmp_path / "file"), "no/home"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert read(library) == ["Of a.", ""]
    assert not (tmp_path / "no").exists()
