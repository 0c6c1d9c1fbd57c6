"""Another number of processes goes on where those before stopped: no pair twice, none left out."""

import dataclasses
import itertools
import json

import pytest

from lightning_jax.data import mixture, packing
from lightning_jax.data.regroup import TO_THE_END, regroup
from lightning_jax.data.sources import Sources
from tests.data.test_mixture import (
    TRACED,
    document_pairs,
    iterator,
    seen_pairs,
    stage,
    take,
    traced,  # noqa: F401
)

SHAPE = dict(seq_len=48, batch_size=12, mixture=(("a", 0.6), ("b", 0.4)))


def go_on(data, count, batches, states=None):
    """Returns what `count` processes read, by source, and their states."""
    seen, after = {name: [] for name in "abc"}, []
    for index in range(count):
        it = iterator(
            data, stage(**SHAPE), tokenizer=TRACED, process_index=index, process_count=count
        )
        if states:
            it.set_states(json.loads(json.dumps(states)))
        for name, pairs in seen_pairs(take(it, batches)).items():
            seen[name] += pairs
        after.append(it.get_state())
        it.close()
    return seen, after


def pairs_of(documents, spans):
    whole = [(d, a, min(b, len(documents[d]) - 1)) for d, a, b in spans]
    return document_pairs(documents, whole)


def slow(*counts):
    return pytest.param(counts, marks=pytest.mark.slow)


# Case F9
@pytest.mark.parametrize(
    "counts", [slow(1, 2), (2, 1), slow(2, 3), slow(4, 2), slow(3, 1, 4, 2)], ids=str
)
@pytest.mark.parametrize("packing_kind", ["concat", "first_fit"])
def test_every_pair_is_read_once(traced, packing_kind, counts, monkeypatch):  # noqa: F811
    monkeypatch.setattr(packing, "_OPEN_ROWS", 5)
    data = dataclasses.replace(traced, packing=packing_kind)
    seen, states = {name: [] for name in "abc"}, None
    for number, count in enumerate(counts):
        now, states = go_on(data, count, 2 + number, states)
        seen = {name: seen[name] + now[name] for name in seen}
    for name in "ab":
        source, given, held = Sources.open(data).train[name], [], []
        for index, state in enumerate(states):
            documents = mixture._endless(source, TRACED, 0, slice(index, None, counts[-1]))
            stream = state["streams"][name]
            given += pairs_of(documents, [(d, 0, TO_THE_END) for d in range(stream["next"])])
            rows = itertools.chain(*json.loads(stream.get("rows", "[]")))
            held += pairs_of(documents, [*rows, *json.loads(stream["spans"])])
        assert sorted(seen[name] + held) == sorted(given) and seen[name]


def test_shares_of_tokens_are_dealt_out():
    stream = {"next": 3, "spans": "[[2, 5, 9]]", "pairs": 40, "documents": 2.5}
    states = [
        {"stage": "s", "tokens": {"a": 100, "b": 7}, "streams": {"a": stream, "b": stream}},
        {"stage": "s", "tokens": {"a": 60, "b": 8}, "streams": {"a": stream, "b": stream}},
    ]
    one = regroup(states, 0, 1)
    assert one["stage"] == "s" and one["tokens"] == {"a": 160, "b": 15}
    # Documents 4 and 5 had been opened; the next unread is 6 in the first process, 7 in the other.
    spans = "[[4, 5, 9], [5, 5, 9], [6, 0, 2147483647]]"
    assert one["streams"]["a"] == {"next": 7, "spans": spans, "pairs": 80, "documents": 5.0}
    assert regroup(states, 2, 4)["tokens"] == {"a": 40, "b": 3}
