"""Cells have texts of their length, none of the source's, whose answers are found in the tokens."""

import functools

import numpy as np
import pytest

from lightning_jax.data import recall
from lightning_jax.data.index import key_of
from lightning_jax.data.recall_cells import DEPTHS, EXAMPLES, make_cells
from lightning_jax.data.tokenizer import ByteTokenizer, train_bpe

BYTES = ByteTokenizer()


def task(path):
    return recall.Task.parse("path", path)


@functools.cache
def documents(path):
    return recall.Documents(task(path))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer that joins the letters of a symbol, and more than that."""
    tasks = (task(path) for path in ("recall:passkey", "recall:mqar,symbols=8"))
    texts = [task.document(number) for task in tasks for number in range(50)]
    return train_bpe(texts, 320, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def test_a_passkey_is_hidden_at_every_length_and_depth():
    cells = make_cells(documents("recall:passkey,digits=2"), BYTES, window=64)
    # Half a window has no room for any text.
    lengths = [64, 128, 256, 512, 1024]
    assert [(c.length, c.depth) for c in cells] == [(n, d) for n in lengths for d in DEPTHS]
    assert [cell.windows for cell in cells[::5]] == [1, 2, 4, 8, 16]
    for cell in cells:
        # Of the shortest texts, some are documents.
        assert EXAMPLES - 4 * (cell.windows == 1) <= len(cell.examples) <= EXAMPLES
        for example in cell.examples:
            text = BYTES.decode(example.tokens[1:].tolist())
            assert 0.7 * cell.length < len(text) <= cell.length
            assert example.tokens[0] == BYTES.bos_id and len(example.tokens) == len(text) + 1
            [(start, stop)] = example.answers
            assert stop == len(example.tokens)
            answer = BYTES.decode(example.tokens[start:stop].tolist())
            before = text.index(f"The pass key is {answer}.")
            share = text[:before].count(".") / (text.count(".") - 1)
            assert abs(share - cell.depth) < 0.5 / (text.count(".") - 1) + 1e-9


@pytest.mark.parametrize("path", ["recall:mqar,symbols=8", "recall:copy,symbols=8"])
def test_tokens_of_answers_spell_the_answers(path, bpe):
    for tokenizer in (BYTES, bpe):
        for cell in make_cells(documents(path), tokenizer, window=12):
            for example in cell.examples:
                ids = example.tokens.tolist()
                first, second = tokenizer.decode(ids).split("\n")
                given = first.split()[1:]
                found = [tokenizer.decode(ids[start:stop]) for start, stop in example.answers]
                # A token that has the space before the answer too belongs to the answer.
                found = [answer.strip() for answer in found]
                if "copy" in path:
                    assert found == [" ".join(given)]
                else:
                    pairs = dict(zip(given[::2], given[1::2], strict=True))
                    assert found == [pairs[key] for key in second.split()[1::2]]
                    assert len(found) == cell.size


def test_lengths_beyond_what_the_keys_fill_are_left_out(bpe):
    cells = make_cells(documents("recall:mqar,symbols=8"), bpe, window=8)
    assert cells[-1].size <= 4 and cells[-1].length < 8 * 16
    assert all(cell.size < 4 for cell in cells[:-1])
    assert not make_cells(documents("recall:passkey"), BYTES, window=2)


def test_no_example_is_a_document_that_may_be_trained_on():
    # Of so short texts of so few symbols, most are documents.
    source = documents("recall:copy,symbols=8,longest=100")
    cell, *_ = make_cells(source, BYTES, window=68)
    made = [BYTES.decode(example.tokens[1:].tolist()) for example in cell.examples]
    assert cell.size == 3 and 4 <= len(set(made)) == len(made)
    assert not np.isin([key_of(text.encode()) for text in made], source.key).any()
    # Of shorter texts all are.
    assert make_cells(source, BYTES, window=36)[0].windows > 0.5


def test_examples_are_those_of_every_model_with_this_tokenizer():
    source = documents("recall:induction")
    first, again = (make_cells(source, BYTES, window=32) for _ in range(2))
    assert [len(cell.examples) for cell in first] == [EXAMPLES] * len(first)
    for cell, same in zip(first, again, strict=True):
        for example, other in zip(cell.examples, same.examples, strict=True):
            np.testing.assert_array_equal(example.tokens, other.tokens)


def test_fewer_tokens_are_fewer_examples_then_fewer_lengths():
    source = documents("recall:induction")
    whole = make_cells(source, BYTES, window=32)
    total = sum(cell.length for cell in whole)
    fewer = make_cells(source, BYTES, window=32, max_tokens=5 * total)
    assert [cell.length for cell in fewer] == [cell.length for cell in whole]
    assert {len(cell.examples) for cell in fewer} == {5}
    shorter = make_cells(source, BYTES, window=32, max_tokens=2 * total)
    assert [cell.length for cell in shorter] == [cell.length for cell in whole[:-1]]
    [shortest] = make_cells(source, BYTES, window=32, max_tokens=1)
    assert shortest.length == whole[0].length and len(shortest.examples) == 4
