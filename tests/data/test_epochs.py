"""Tokens and epochs by source: what a run has read, and what it plans to read."""

import dataclasses
import json
import logging

import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data import epochs, mixture
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import ByteTokenizer
from tests.tiny import tiny_stage

TOKENIZER = ByteTokenizer()


def stage(**changes):
    return tiny_stage(**{"name": "one", "mixture": (("a", 0.5), ("b", 0.5)), **changes})


STAGES = [
    (stage(), 7),
    (stage(name="two", seq_len=5, batch_size=4, mixture=(("a", 1.0), ("b", 0.0))), 6),
    (stage(name="three", seq_len=24, mixture=(("b", 0.3), ("c", 0.7))), 5),
]


@pytest.fixture
def data(tmp_path):
    for name, count in (("a", 2), ("b", 30), ("c", 1)):
        lines = [json.dumps({"text": name * (3 * i + 9)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "held_out.txt").write_text("held out")
    held_out = str(tmp_path / "held_out.txt")
    sources = tuple(SourceConfig(n, f"{tmp_path}/{n}.jsonl", held_out, 1.0) for n in "abc")
    return DataConfig("bytes", sources, "text", 0.2, "concat", 0, 1)


def run(data, state=None, first=0, skip=0):
    """Yields (stage, step, batch, consumed, state) of every step."""
    sources = Sources.open(data)
    for index, (config, count) in [*enumerate(STAGES)][first:]:
        batches = mixture.make_train_iterator(sources, data, config, tokenizer=TOKENIZER, seed=0)
        if state is not None:
            batches.set_state(json.loads(state))
        for step in range(skip, count):
            batch = next(batches)
            state = json.dumps(batches.get_state())
            yield (
                index,
                step,
                batch,
                epochs.consumed(epochs.counts(batches.get_state()), sources),
                state,
            )
        batches.close()
        skip = 0


# Case B6
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_counts_are_of_the_batches_across_stages_and_prefetch(packing, prefetch, data):
    data = dataclasses.replace(data, packing=packing, prefetch=prefetch)
    train, seen = Sources.open(data).train, dict.fromkeys("abc", 0)
    targets = {n: sum(len(t.encode()) + 1 for t in train[n].texts()) for n in "abc"}
    for _, _, batch, consumed, _ in run(data):
        for row, mask in zip(batch.tokens, batch.loss_mask, strict=True):
            (name,) = [n for n in "abc" if ord(n) in row]
            seen[name] += int(mask.sum())
        assert {name: row["tokens"] for name, row in consumed.items()} == {
            name: seen[name] for name in consumed
        }
        for name, row in consumed.items():
            # All documents are given equally often but in the epoch that is not complete.
            assert abs(row["epochs"] - seen[name] / targets[name]) < 1
            if name == "c":
                assert row["epochs"] == pytest.approx(seen[name] / targets[name])
    assert set(consumed) == set("abc") and consumed["a"]["epochs"] > 4


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 3])
def test_counts_go_on_after_a_resume(prefetch, data):
    data = dataclasses.replace(data, packing="first_fit", prefetch=prefetch)
    steps = [*run(data)]
    for at in (0, 5, 8, 12, 14):
        index, step, _, _, state = steps[at]
        resumed = [consumed for _, _, _, consumed, _ in run(data, state, index, step + 1)]
        assert resumed == [consumed for _, _, _, consumed, _ in steps[at + 1 :]]


def test_streams_are_summed_in_order_whoever_has_counted_them(data):
    data, config = dataclasses.replace(data, streams=2), stage(batch_size=4)
    sources, options = Sources.open(data), dict(tokenizer=TOKENIZER, seed=0)
    parts = [
        mixture.make_train_iterator(sources, data, config, rows=rows, **options)
        for rows in (None, (2, 3), (0, 1))
    ]
    for _ in range(5):
        for part in parts:
            next(part)
    all_streams, *each = [epochs.counts(json.loads(json.dumps(p.get_state()))) for p in parts]
    consumed = epochs.consumed(all_streams, sources)
    assert epochs.consumed(each[0] | each[1], sources) == consumed
    assert sum(row["tokens"] for row in consumed.values()) == 5 * 4 * 16


# Case B6
def test_a_plan_that_repeats_a_source_often_is_warned_about(data, caplog):
    sources = Sources.open(data)
    size = sum(len(text.encode()) + 1 for text in sources.train["a"].texts())
    stages = [stage(tokens=2000), stage(tokens=1000, mixture=(("a", 1.0), ("b", 3.0)))]
    with caplog.at_level(logging.WARNING, "lightning_jax"):
        planned = epochs.planned_epochs(sources, stages, TOKENIZER)
    assert list(planned) == ["a", "b"]
    assert planned["a"] == pytest.approx(1250 / size)
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"data.sources.a: the stages read 1,250 tokens of it, which has about {size}:" in line
    assert "Muennighoff" in line and "\n" not in line
    caplog.clear()
    epochs.planned_epochs(sources, [stage(tokens=2 * size)], TOKENIZER)
    assert not caplog.records


def test_a_planned_source_must_have_something_left(data, tmp_path):
    path = str(tmp_path / "a.jsonl")
    data = dataclasses.replace(
        data, sources=(SourceConfig("a", path, path, 1.0), *data.sources[1:])
    )
    with pytest.raises(UserError, match="data.sources.a.path.*nothing is left"):
        epochs.planned_epochs(Sources.open(data), [stage()], TOKENIZER)
    only_b = stage(mixture=(("a", 0.0), ("b", 1.0)))
    assert list(epochs.planned_epochs(Sources.open(data), [only_b], TOKENIZER)) == ["b"]
