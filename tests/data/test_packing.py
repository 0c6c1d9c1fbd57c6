import json
import re

import grain
import numpy as np
import pytest

from lightning_jax.data import packing
from lightning_jax.data.tokenizer import ByteTokenizer

KINDS = ["concat", "first_fit"]


def documents(lengths):
    """Documents of the given numbers of pairs; every token is unique, so pairs can be traced."""
    ends = np.cumsum([n + 1 for n in lengths])
    return [np.arange(e - n - 1, e, dtype=np.int32) + 1 for n, e in zip(lengths, ends, strict=True)]


def dataset(docs, seq_len, kind):
    return packing.PackDataset(docs, seq_len=seq_len, packing=kind)


def pairs(docs):
    return [(int(a), int(b)) for d in docs for a, b in zip(d[:-1], d[1:], strict=True)]


LENGTHS = {
    "ordinary": [5, 3, 9, 1, 30, 2, 2, 7, 16, 8, 11],
    "one short": [1],
    "one long": [100],
    "exact": [8, 8, 16, 8],
    "many": list(np.random.default_rng(0).integers(1, 25, 120)),
}


@pytest.mark.parametrize("seq_len", [1, 8, 13])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_once_and_segments_do_not_mix(kind, name, seq_len):
    docs = documents(LENGTHS[name])
    owner = {int(t): i for i, d in enumerate(docs) for t in d}
    seen, count, padding = [], 0, 0
    for row in dataset(docs, seq_len, kind):
        count += 1
        assert row._fields == ("tokens", "targets", "segment_ids", "positions", "loss_mask")
        assert all(a.shape == (seq_len,) for a in row)
        assert row.loss_mask.dtype == np.float32
        assert all(array.dtype == np.int32 for array in row[:-1])
        real = row.segment_ids > 0
        np.testing.assert_array_equal(row.loss_mask, real)
        assert np.all(np.diff(real.astype(int)) <= 0)  # padding is at the end
        assert not any(array[~real].any() for array in row)
        padding += int((~real).sum())
        for segment in range(1, row.segment_ids.max() + 1):
            at = np.flatnonzero(row.segment_ids == segment)
            assert np.all(np.diff(at) == 1)
            np.testing.assert_array_equal(row.positions[at], np.arange(len(at)))
            np.testing.assert_array_equal(row.targets[at], row.tokens[at] + 1)
            assert len({owner[int(t)] for t in row.tokens[at]}) == 1
            assert len({owner[int(t)] for t in row.targets[at]}) == 1
        seen += list(zip(row.tokens[real].tolist(), row.targets[real].tolist(), strict=True))
    assert len(seen) == len(set(seen))
    assert sorted(seen) == pairs(docs)
    if kind == "concat":
        assert seen == pairs(docs)
        assert padding < seq_len and count == -(-len(seen) // seq_len)


def test_first_fit_cuts_only_long_documents():
    docs = documents(LENGTHS["many"])
    starts = {int(d[0]): len(d) - 1 for d in docs}
    for row in dataset(docs, 16, "first_fit"):
        for at in np.flatnonzero((row.positions == 0) & (row.segment_ids > 0)):
            size = int((row.segment_ids == row.segment_ids[at]).sum())
            length = starts.get(int(row.tokens[at]))
            assert length is None or size == min(length, 16)


@pytest.mark.parametrize("name", ["ordinary", "one long", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_at_every_row(kind, name, monkeypatch):
    monkeypatch.setattr(packing, "_OPEN_ROWS", 4)
    grain.experimental.assert_equal_output_after_checkpoint(
        dataset(documents(LENGTHS[name][:20]), 8, kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_json_and_later_rows(kind):
    rows = dataset(documents(LENGTHS["many"]), 16, kind)
    iterator = iter(rows)
    for _ in range(37):
        next(iterator)
    state = iterator.get_state()
    written = json.dumps(state)
    rest = list(iterator)
    assert json.dumps(state) == written
    other = iter(rows)
    next(other)
    other.set_state(json.loads(written))
    np.testing.assert_equal(list(other), rest)


@pytest.mark.parametrize("length", [1, 4, 60])
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_with_documents_that_were_changed(kind, rows, length):
    """The parts that are left of documents already opened are cut; later documents are whole."""
    before = iter(dataset(documents([30] * 40), 16, kind))
    for _ in range(rows):
        next(before)
    state = json.loads(json.dumps(before.get_state()))
    changed = documents([length] * 40)
    after = iter(dataset(changed, 16, kind))
    after.set_state(state)
    seen = [
        pair
        for row in after
        for pair in zip(*(a[row.loss_mask > 0].tolist() for a in row[:2]), strict=True)
    ]
    assert len(seen) == len(set(seen)) and set(seen) <= set(pairs(changed))
    assert set(seen) >= set(pairs(changed[state["next"] :]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_documents_no_rows(kind):
    assert list(dataset([], 4, kind)) == []


def test_document_tokens():
    tokens = packing.document_tokens("hé", ByteTokenizer())
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [256, 0x68, 0xC3, 0xA9, 257]
    assert packing.document_tokens("", ByteTokenizer()).tolist() == [256, 257]


class MarksBeginnings:
    """As SentencePiece: a text begins with a token of its own."""

    bos_id, eos_id = 1000, 1001

    def encode(self, text):
        return [999, *text.encode()]


class SplitsAtSpaces(MarksBeginnings):
    """Tokens are the lengths of words with the space before them, as byte-level BPE has them."""

    def encode(self, text):
        return [len(word) for word in re.findall(r" ?[^ \n]+|\s", text)]


# Case E7
@pytest.mark.parametrize("kind", [ByteTokenizer, MarksBeginnings, SplitsAtSpaces])
def test_a_long_text_is_encoded_in_pieces_as_if_whole(kind, monkeypatch):
    monkeypatch.setattr(packing, "_PIECE", 100)
    monkeypatch.setattr(packing, "_AROUND", 10)
    rng, tokenizer = np.random.default_rng(0), kind()
    for letters in ("ab é漢\n", "ab", "a\n", "a "):
        for length in (0, 99, 100, 101, 1000):
            text = "".join(rng.choice([*letters], length))
            whole = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
            tokens = packing.document_tokens(text, tokenizer)
            assert tokens.dtype == np.int32 and tokens.tolist() == whole
    pieces = [*packing._pieces("some words\n" * 100, tokenizer)]
    assert "".join(pieces) == "some words\n" * 100
    assert (len(pieces) > 8) == (kind is not MarksBeginnings)


@pytest.mark.parametrize("seq_len", [5, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_count_the_pairs_and_documents_that_they_give(kind, seq_len):
    lengths = LENGTHS["many"]
    iterator = iter(dataset(documents(lengths), seq_len, kind))
    given, real = 0, set()
    for row in iterator:
        given += int(row.loss_mask.sum())
        real.update(row.tokens[row.segment_ids > 0].tolist())
        state = iterator.get_state()
        assert state["pairs"] == given
        if kind == "concat":
            ends = np.cumsum(lengths)
            whole = int(np.searchsorted(ends, given, side="right"))
            part = (given - ends[whole - 1] * (whole > 0)) / lengths[min(whole, len(ends) - 1)]
            assert state["documents"] == pytest.approx(whole + part * (whole < len(ends)))
    assert iterator.get_state()["documents"] == pytest.approx(len(lengths))


@pytest.mark.parametrize("kind", KINDS)
def test_counts_go_on_at_another_length(kind):
    docs = documents(LENGTHS["many"])
    first, second = iter(dataset(docs, 16, kind)), iter(dataset(docs, 7, kind))
    for _ in range(9):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for _ in second:
        pass
    state = second.get_state()
    assert state["pairs"] == sum(LENGTHS["many"])
    assert state["documents"] == pytest.approx(len(docs))
