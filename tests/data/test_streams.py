"""Streams: the same batches whoever makes them, each epoch shared out, rows mixed as in one."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.data import mixture, packing, streams
from lightning_jax.data.batch import Batch
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import ByteTokenizer
from tests.data import test_mixture
from tests.data.test_mixture import (
    TRACED,
    data,  # noqa: F401
    iterator,
    run_stages,
    stage,
    traced,  # noqa: F401
)

# Seams with another length, batch size and mixture; a source that rests and comes back.
STAGES = [
    (dict(name="one", seq_len=48, batch_size=8, mixture=(("a", 0.7), ("b", 0.3))), 4),
    (dict(name="two", seq_len=17, batch_size=16, mixture=(("a", 1.0), ("b", 0.0))), 2),
    (dict(name="three", seq_len=96, batch_size=8, mixture=(("b", 0.5), ("c", 0.5))), 3),
]


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    monkeypatch.setattr(test_mixture, "STAGES", STAGES)
    monkeypatch.setattr(packing, "_OPEN_ROWS", 5)


class Process:
    """One of `count` processes, whose devices hold every `count`-th pair of rows of each batch."""

    def __init__(self, index, count):
        self.index, self.count = index, count

    def rows(self, size):
        return [row for row in range(size) if row // 2 % self.count == self.index]


def train(data, count, state=None, first=0, skip=0):  # noqa: F811
    """Yields (stage, left in it, global batch, positions of all streams) of `count` processes."""
    processes = [Process(index, count) for index in range(count)]
    position = state and json.loads(state)
    for index, (changes, steps) in enumerate(STAGES[first:], first):
        config = stage(**changes)
        iterators = []
        for process in processes:
            rows = process.rows(config.batch_size)
            iterators.append(iterator(data, config, tokenizer=TRACED, rows=rows))
            if position:
                iterators[-1].set_state(position)
        for number in range(skip + 1, steps + 1):
            parts, position = [next(it) for it in iterators], {"streams": {}}
            for it in iterators:
                position["streams"] |= json.loads(json.dumps(it.get_state()["streams"]))
            whole = Batch.empty(config.batch_size, config.seq_len)
            for process, part in zip(processes, parts, strict=True):
                for to, values in zip(whole, part, strict=True):
                    to[process.rows(config.batch_size)] = values
            yield index, steps - number, whole, json.dumps(position, sort_keys=True)
        for it in iterators:
            it.close()
        skip = 0


# Case F9
@pytest.mark.slow
@pytest.mark.parametrize("packing_kind", ["concat", "first_fit"])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_batches_and_positions_do_not_depend_on_who_makes_them(traced, packing_kind, count):  # noqa: F811
    data = dataclasses.replace(traced, packing=packing_kind, streams=count, prefetch=0)  # noqa: F811
    alone = [*run_stages(data)]
    for processes in (1, 2, 4):
        together = [*train(data, processes)]
        np.testing.assert_equal([step[2] for step in together], [step[2] for step in alone])
        positions = [json.loads(step[3]) for step in together]
        assert positions == [json.loads(step[3]) for step in alone]
    # Another number of processes goes on in the middle of a stage, and at a seam.
    for before, after, at in ((4, 1, 1), (1, 4, 3), (2, 4, 6)):
        index, left, _, state = [*train(data, before)][at]
        first, skip = (index, STAGES[index][1] - left) if left else (index + 1, 0)
        went_on = [*train(data, after, state, first, skip)]
        np.testing.assert_equal([s[2] for s in went_on], [s[2] for s in alone[at + 1 :]])


def test_a_process_makes_no_streams_but_those_of_its_rows(data):  # noqa: F811
    data = dataclasses.replace(data, streams=4)
    some = iterator(data, stage(batch_size=8), rows=(2, 5))
    whole = next(iterator(data, stage(batch_size=8)))
    batch = next(some)
    np.testing.assert_equal(batch, Batch(*(array[[2, 5]] for array in whole)))
    assert [*some.get_state()["streams"]] == ["1", "2"]
    some.close()
    with pytest.raises(UserError, match="^the position of data stream 3 is not known$"):
        iterator(data, stage(batch_size=8), rows=(7,)).set_state(some.get_state())


@pytest.mark.parametrize("count", [1, 3, 8])
def test_streams_share_each_epoch(data, count):  # noqa: F811
    source = Sources.open(data).train["a"]
    parts = [
        mixture._endless(source, ByteTokenizer(), 0, slice(v, None, count)) for v in range(count)
    ]
    epochs = 3
    given = [
        bytes(parts[number % count][number // count][1:5].astype(np.uint8)).decode()
        for number in range(epochs * len(source))
    ]
    names = {text[:4] for text in source.texts()}
    for epoch in range(epochs):
        assert sorted(given[epoch * len(source) :][: len(source)]) == sorted(names)
    assert given[: len(source)] != given[len(source) :][: len(source)]


def test_rows_of_a_batch_are_mixed_as_those_of_one_stream(traced):  # noqa: F811
    weights = {"a": 0.5, "b": 0.45, "c": 0.05}
    for count in (1, 5, 20):
        data = dataclasses.replace(traced, streams=count)  # noqa: F811
        config = stage(batch_size=20, mixture=tuple(weights.items()))
        it = iterator(data, config, tokenizer=TRACED)
        total = collections.Counter()
        for _ in range(20):
            sources = next(it).tokens.min(axis=1) // 100_000
            rows = collections.Counter("abc"[source] for source in sources)
            total += rows
            for name, weight in weights.items():
                assert abs(rows[name] - 20 * weight) <= 1
        it.close()
        for name, weight in weights.items():
            assert abs(total[name] - 400 * weight) <= 1


def test_streams_begin_where_one_mix_would_be():
    weights = {"a": 0.5, "b": 0.25, "c": 0.25}
    before = streams.rows_before(weights, each=2, count=4)
    assert before[0] == {"a": 0, "b": 0, "c": 0}
    assert [sum(rows.values()) for rows in before] == [0, 2, 4, 6]
    assert before[2] == {"a": 2, "b": 1, "c": 1}


def test_a_source_needs_a_document_for_each_stream(data):  # noqa: F811
    few = len(Sources.open(data).train["c"])
    data = dataclasses.replace(data, streams=few + 1)
    config = stage(batch_size=few + 1)
    with pytest.raises(UserError) as refused:
        iterator(data, config)
    assert str(refused.value) == (
        f"data.streams = {few + 1}: must be at most {few}, the documents of data.sources.c"
    )
    iterator(data, stage(batch_size=few + 1, mixture=(("a", 1.0), ("c", 0.0))))
