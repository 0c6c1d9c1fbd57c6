"""The numbers of a card are those of the run's files."""

import dataclasses
from types import SimpleNamespace

import pytest

from lightning_jax import accounting, card
from lightning_jax.card.facts import excerpt
from lightning_jax.train.plan import Plan
from tests.card.some import CONFIG, facts


def test_numbers_are_means_over_held_out_tokens_and_sums_over_stages():
    found = facts()
    assert found.experts_per_token == (3 * 30 + 1 * 10) / 40
    assert facts(evaluation={}).experts_per_token is None
    summary = found.summary()
    assert summary["seconds"] == pytest.approx(60)
    assert summary["tokens"] == Plan.of(CONFIG).total_tokens
    assert summary["held_out"]["code"] == {
        "bytes": 100,
        "this model": 1.8,
        "gzip -9": 2.0,
        "xz -9e": 1.6,
    }
    each = [
        segment.steps
        * segment.step_tokens
        * accounting.flops_per_token(CONFIG.model, seq_len=segment.seq_len, experts_per_token=2.5)
        for segment in Plan.of(CONFIG).segments
    ]
    assert summary["training_flops"] == pytest.approx(sum(each))


def test_a_run_that_was_stopped_cost_what_it_has_done():
    first = Plan.of(CONFIG).segments[0]
    whole, stopped = facts(), facts()
    meta = dataclasses.replace(stopped.run.loaded.meta, tokens=first.step_tokens)
    stopped.run.loaded = SimpleNamespace(meta=meta)
    one = accounting.flops_per_token(CONFIG.model, seq_len=first.seq_len, experts_per_token=2.5)
    assert stopped.training_flops == pytest.approx(first.step_tokens * one)
    assert stopped.training_flops < whole.training_flops


def test_the_excerpt_begins_after_an_empty_line_and_fits_a_row():
    meta = SimpleNamespace(seq_len=100)
    run = SimpleNamespace(encode=lambda text: list(text), loaded=SimpleNamespace(meta=meta))
    code = "".join(f"def f{n}(x):\n    return x\n\n" for n in range(1000))
    assert len(found := excerpt(run, ["short", code])) == 100
    assert found.startswith("def f") and found[:20] in code
    assert excerpt(run, ["a short text"]) == "t text"
    meta.seq_len = 4096
    assert 800 < len(excerpt(run, ["short", code])) <= 900


def test_a_run_is_known_by_its_config(tmp_path):
    assert not card.is_run(tmp_path)
    (tmp_path / "config.json").touch()
    assert card.is_run(tmp_path)
