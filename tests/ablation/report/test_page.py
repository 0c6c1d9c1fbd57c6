"""The page is one file, begins with the answer, and escapes what it is given."""

import base64
import re

import pytest

from lightning_jax.ablation.report import page
from lightning_jax.ablation.report.pictures import Picture
from lightning_jax.ablation.report.summary import summarize
from tests.ablation.fake_runs import SCORES, write_sweep

PICTURES = [
    Picture("intervals", "quality", "Intervals.", b"png"),
    Picture("router_full_load", "router full", "Load.", b"other"),
    Picture("router_full_wide_load", "router full_wide", "Not here.", b"other"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    sweep = write_sweep(root, scores={**SCORES, "shared": (2.01, None, 1.95)})
    return {**summarize(sweep, root), "command": "python -m experiments.report '<x>'"}


def test_the_answer_comes_first_and_nothing_from_elsewhere(report):
    text = page.build(report, PICTURES, {"full": "<b>"})
    places = [
        text.index(part)
        for part in (
            "<h1>Is sharing &lt;free&gt;?</h1>",
            "Against full, hybrid is better",
            "Incomplete: 1 of 9 runs",
            "hybrid needs ",
            '<td class="verdict better">better</td>',
            "report_intervals.png, by python -m experiments.report &#x27;&lt;x&gt;&#x27;",
            "How the verdicts are made",
            "What the arms cost",
            "By domain",
            "<h3>full</h3>",
            "Load.",
            "model.unit = Gg",
            "shared seed 1",
            "commit abc",
        )
    ]
    assert places == sorted(places)
    assert "Not here." not in text and text.count("Incomplete: ") == 1
    assert base64.b64decode(re.findall(r"base64,([^\"]*)", text)[0]) == b"png"
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text


def test_sentences_are_those_of_the_summary(report):
    text = page.build(report, [], {})
    assert all(arm["sentence"] in text for arm in report["arms"])


def test_the_text_that_arms_are_judged_on_is_named(report):
    assert "the same for every arm: code 3,000, docs 500." in page.build(report, [], {})


def test_wide_tables_become_lists_on_a_phone(report):
    text = page.build(report, [], {})
    assert '<table class="cards">' in text and '<td data-name="seeds">3</td>' in text


def test_withheld_verdicts_are_said_first(report):
    arms = [{**arm, "difference": None} for arm in report["arms"]]
    withheld = {"withheld": "why", "headline": "Verdicts are withheld: why.", "domains": {}}
    text = page.build({**report, **withheld, "arms": arms, "method": None}, [], {})
    assert text.index("Verdicts are withheld: why.") < text.index("<table")
    assert '<td class="verdict withheld">withheld</td>' in text


def test_a_metric_of_mostly_noise_is_grey(report):
    domains = {name: {**domain, "is_shown": name == "code"}
               for name, domain in report["domains"].items()}  # fmt: skip
    text = page.build({**report, "domains": domains}, [], {})
    assert '<th class="grey">docs</th>' in text and "<th>code</th>" in text
