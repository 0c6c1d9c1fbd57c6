"""The page of a card is whole, valid, one file, and shows what it is given."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_jax.card import page
from lightning_jax.train.record import Record
from tests.card.some import facts
from tests.tiny import tiny_model

WITHOUT_END = {"meta", "img", "br"}


class Balance(HTMLParser):
    """Raises where an end tag is not that of the innermost element."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in WITHOUT_END:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


@pytest.fixture(scope="module")
def card():
    return page.build(facts())


def test_it_is_one_valid_file(card):
    parser = Balance()
    parser.feed(card)
    assert not parser.open
    assert "<script" not in card and "http" not in card and "@import" not in card
    assert not re.search(r'(src|href)="(?!data:)', card)
    assert card.count("data:image/png;base64,") == 2


def test_it_has_a_part_for_everything(card):
    parts = re.findall("<h2>(.*?)</h2>", card)
    assert parts == [
        "Held-out text, bits per byte",
        "Layers",
        "Training",
        "What the mechanisms save",
        "Experts per token",
        "A sample",
        "Cost",
        "Where it comes from",
        "Config",
        "What to try next",
    ]
    for shown in (
        "<h1>Card of runs/&lt;a&gt;</h1>",
        "Held-out code: 1.800 bits per byte, 10.0% less than gzip -9 (2.000)",
        "Of code the model is judged on the first 50 bytes.",
        "8 experts in each routed layer, 2.50 of them used per token",
        "KV-cache bytes per token, context 64K",
        'title="1.50 experts">a&lt;</span>',
        "after &#x27;def &#x27;",
        "def x &lt; y",
        "<td>1.0</td>",
        "python -m experiments.train --workdir=runs/a",
        "abc",
        "jax 0.10",
        "sha256 " + "f" * 16,
        "&quot;LG&quot;",
        "--eval.top_p=0.3",
    ):
        assert shown in card, shown


def test_a_dense_run_without_steps_or_evaluation_has_a_shorter_card():
    found = facts(rows=[], evaluation={}, held_out=[], routing=None, changed=[], record=Record({}))
    found.run.model = tiny_model(moe__num_experts=0, moe__target_experts=0.0)
    card = page.build(found)
    parts = re.findall("<h2>(.*?)</h2>", card)
    assert not {"Training", "Experts per token", "Config"} & set(parts)
    assert "no evaluation yet" in card and "--eval.top_p" not in card


def test_it_is_written_into_the_folder(tmp_path):
    path = page.write(facts(workdir=str(tmp_path)))
    assert path == tmp_path / "card.html" and path.read_text().startswith("<!doctype html>")


def test_the_last_words_say_how_it_compares_and_what_to_try():
    verdict, none, where, blank, title, *steps = page.last_words(facts()).splitlines()
    assert verdict.startswith("Held-out code: 1.800 bits per byte, 10.0% less than gzip -9")
    assert none == "Held-out docs: no bits per byte" and (blank, title) == ("", "Next:")
    assert where == "The card of this run: runs/<a>/card.html"
    programs = {Path(line.split(": ", 1)[1].split()[0]).name for line in steps}
    assert len(steps) == 6 and programs == {"python", "tensorboard"}
