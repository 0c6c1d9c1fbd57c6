"""The generated pages are those of the code."""

import re

import pytest

from docs.tools import config_fields, generate
from lightning_jax.config import RunConfig


@pytest.mark.parametrize("name", generate.PAGES)
def test_the_page_is_current(name):
    text = (generate.DOCS / name).read_text(encoding="utf-8")
    assert text == generate.PAGES[name](), f"docs/{name} is old: make docs-reference"


def test_every_field_has_a_meaning():
    found = config_fields.fields()
    assert len(found) > 90 and not [field.path for field in found if not field.meaning]


def test_choices_and_ranges_are_those_of_the_checks():
    by_path = {field.path: field for field in config_fields.fields()}
    assert by_path["optimizer.name"].right == "one of adamw, muon"
    assert by_path["model.moe.top_p"].right == "in (0, 1]"
    assert by_path["model.moe.implementation"].right.startswith("empty, or one of onehot")
    assert by_path["stages.*.decay"].right == "one of none, linear, cosine, sqrt"
    assert by_path["stages.*.batch_size"].default == "`8`"
    assert by_path["data.sources.*.path"].default == "none"
    assert by_path["seed"].right == "a whole number in [0, 2^32 - 1]"


def test_a_field_without_a_comment_is_an_error(monkeypatch, tmp_path):
    text = config_fields.SOURCE.read_text()
    source = tmp_path / "base.py"
    source.write_text(re.sub(r"    config\.seed = 0.*\n", "", text))
    monkeypatch.setattr(config_fields, "SOURCE", source)
    with pytest.raises(KeyError, match="seed has no line"):
        config_fields.fields()


def test_every_field_of_the_dataclasses_has_a_row():
    rows = {field.path for field in config_fields.fields()}
    assert rows == {path for path, _ in config_fields._leaves(RunConfig)}
