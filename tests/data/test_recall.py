"""Recall tasks: what they ask for can be read off their text, and documents are always the same."""

import hashlib

import numpy as np
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.data import recall
from lightning_jax.data.index import IndexStore, key_of
from lightning_jax.data.sources import Sources
from tests.tiny import tiny_run

TASKS = ("passkey", "mqar", "induction", "copy")


def task(path):
    return recall.Task.parse("data.sources.a.path", path)


def answers(text):
    return [text.text[start:stop] for start, stop in text.answers]


def test_a_passkey_stands_once_at_its_depth_and_is_asked_for_at_the_end():
    for depth, place in ((0.0, 0), (0.5, 4), (1.0, 8)):
        text = task("recall:passkey,digits=3").draw(8, depth, 1)
        *sentences, question = text.text.split(". ")
        number = question.removeprefix("The pass key is ")
        assert len(number) == 3 and answers(text) == [number]
        assert [f"The pass key is {number}" == s for s in sentences].index(True) == place
        assert len(sentences) == 9


def test_mqar_asks_for_each_key_once():
    text = task("recall:mqar,symbols=24").draw(12, 0.0, 1)
    first, second = (part.split()[1:] for part in text.text.split("\n"))
    given = dict(zip(first[::2], first[1::2], strict=True))
    asked = dict(zip(second[::2], second[1::2], strict=True))
    assert given == asked and len(given) == 12 and list(given) != list(asked)
    assert not set(given) & set(given.values())
    assert answers(text) == second[1::2]


@pytest.mark.parametrize("depth, place", [(0.0, 0), (0.5, 10), (1.0, 19)])
def test_induction_asks_for_what_stood_at_one_place(depth, place):
    text = task("recall:induction,symbols=8").draw(20, depth, 1)
    *words, last = text.text.split()[1:]
    pairs = list(zip(words[:-1:2], words[1:-1:2], strict=True))
    assert len(pairs) == 20 and len(set(pairs)) == len(dict(pairs))
    assert [key == words[-1] for key, _ in pairs].index(True) == place
    assert [key for key, _ in pairs].count(words[-1]) == 1
    assert answers(text) == [dict(pairs)[words[-1]]] == [last]


def test_copy_repeats_its_symbols():
    text = task("recall:copy,symbols=4").draw(30, 0.0, 1)
    first, second = text.text.split("\n")
    assert answers(text) == [first.removeprefix("Text: ")] == [second.removeprefix("Copy: ")]
    assert set(first.split()[1:]) == set(recall.SYLLABLES[:4])


def test_the_next_seed_gives_another_text_and_the_same_seed_the_same():
    for name in TASKS:
        draw = task(f"recall:{name}").draw
        assert draw(5, 0.5, "a", 1) == draw(5, 0.5, "a", 1) != draw(5, 0.5, "a", 2)


def test_documents_are_hashed_once(tmp_path, monkeypatch):
    made = task("recall:copy,symbols=8,longest=100")
    first = recall.Documents(made, IndexStore(tmp_path))
    monkeypatch.setattr(recall.Task, "document", lambda *_: pytest.fail("made again"))
    again = recall.Documents(made, IndexStore(tmp_path))
    assert first.digest == again.digest and len(first.digest) == 32
    np.testing.assert_array_equal(first.key, again.key)
    np.testing.assert_array_equal(first.size, again.size)


# Seeded by words, so that no machine and no Python draws others.
@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("passkey", "f5d88004beb4a726"),
        ("mqar", "7de452a4cc502374"),
        ("induction", "ec8987ec4619d77d"),
        ("copy", "e39acff5fa96f49b"),
    ],
)
def test_documents_are_those_of_every_machine(name, digest):
    documents = (task(f"recall:{name}").document(number) for number in range(20))
    assert hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", TASKS)
def test_documents_fit_their_longest_and_most_are_shorter(name):
    made = task(f"recall:{name},longest=400")
    sizes = [len(made.document(number)) for number in range(300)]
    assert max(sizes) <= 400 and max(sizes) > 300 and np.median(sizes) < 200
    assert min(sizes) < 70


def test_nothing_but_an_earlier_place_says_the_answer():
    made = task("recall:passkey,longest=200,digits=2")
    found = [made.document(number).split(". ") for number in range(3000)]
    keys = np.array([int(text[-1].split()[-1]) for text in found])
    places = [[s.startswith("The pass") for s in text].index(True) for text in found]
    # Numbers of long and short texts, and early and late in them, are alike.
    for known in ([len(text) for text in found], places):
        for digit in (keys // 10, keys % 10):
            assert abs(np.corrcoef(known, digit)[0, 1]) < 0.06


@pytest.mark.parametrize("symbols", [4, len(recall.SYLLABLES)])
def test_symbols_are_different_words(symbols):
    assert len(set(recall.SYLLABLES)) == len(recall.SYLLABLES)
    words = set(task(f"recall:copy,symbols={symbols}").draw(20_000, 0, 1).text.split())
    assert len(words - {"Text:", "Copy:"}) == symbols


def test_chance_is_that_of_a_blind_guess():
    assert task("recall:passkey,digits=2").chance(9) == pytest.approx(0.01)
    assert task("recall:mqar,symbols=10").chance(3) == pytest.approx(0.2)
    assert task("recall:induction,symbols=9").chance(3) == pytest.approx(0.2)
    assert task("recall:copy,symbols=10").chance(3) == pytest.approx(0.001)


def test_a_run_trains_on_none_of_the_documents_that_it_holds_out(tmp_path):
    config = tiny_run("recall:mqar,symbols=8,longest=100")
    sources = Sources.open(config.data, tmp_path)
    train, held_out = sources.train["a"], sources.eval["a"]
    assert len(train) + len(held_out) <= recall.DOCUMENTS and len(held_out) > 100
    assert not np.isin(train.gather("key"), held_out.gather("key")).any()
    document = train[5]
    assert document["origin"] == f"recall:mqar:{train.members[5] + 1}"
    assert key_of(document["text"].encode()) == train.gather("key")[5]
    assert train.num_bytes == sum(len(text) for text in train.texts())
    assert train.fingerprint == Sources.open(config.data, tmp_path).train["a"].fingerprint


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("recall:pass_key", 'recall: and one of passkey, mqar, induction, copy (did you mean "pas'),
        ("recall:", "recall: and one of passkey"),
        ("recall:copy,digits=3", "with options of copy: one of longest, symbols"),
        ("recall:passkey,digit=3", 'one of longest, digits (did you mean "digits"?)'),
        ("recall:passkey,digits=1", "with digits = a number in [2, 50]"),
        ("recall:passkey,digits=", "with digits = a number in"),
        ("recall:mqar,symbols=1e3", "with symbols = a number in [4, "),
        ("recall:mqar,longest=-5", "with longest = a number in [100, 100000]"),
        ("recall:copy,symbols=" + "9" * 5000, "with symbols = a number in"),
        ("recall:copy,symbols=8,symbols=9", "with symbols once"),
        ("recall:mqar,", "with options of mqar: one of longest, symbols"),
    ],
)
def test_paths_that_name_no_task_are_refused(path, right):
    with pytest.raises(UserError) as refused:
        task(path)
    assert str(refused.value).startswith(f"data.sources.a.path = {path!r}"[:400])
    assert right in str(refused.value) and "\n" not in str(refused.value)
