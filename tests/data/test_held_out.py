"""What is held out is trained on by no source: random trees of files, globs, copies and links."""

import glob
import json
import os
import random
from os.path import isfile

import numpy as np
import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data import held_out
from lightning_jax.data.index import BLANK, UNREADABLE, key_of
from lightning_jax.data.sources import Sources

FRACTION = 0.2


def content(text):
    return text.strip().replace("\r\n", "\n")


def open_all(cache, *sources):
    """Sources of (name, path, eval_path)."""
    configs = tuple(SourceConfig(*source, 1.0) for source in sources)
    return Sources.open(DataConfig("bytes", configs, "text", FRACTION, "concat", 0, 1), cache)


def contents(split):
    return {content(text) for text in split.texts()}


POOL = [f"text {i}:\n" + f"line {i}\n" * (i % 7) for i in range(25)]
PATTERNS = [
    "**/*.txt",
    "*.txt",
    "a/**/*.txt",
    "b/*.*",
    "**/*.jsonl",
    "**/*.*",
    "a/b/*.*",
    "c/**/*.jsonl",
]


def disguised(text, rng):
    """The same content in other bytes."""
    return rng.choice(
        [text, text + "\n\n", "  " + text, text.replace("\n", "\r\n"), "\ufeff" + text]
    )


def make_tree(folder, rng):
    for number in range(rng.randint(4, 40)):
        parent = folder.joinpath(*rng.choices("abc", k=rng.randint(0, 2)))
        parent.mkdir(parents=True, exist_ok=True)
        if rng.random() < 0.7:
            text = disguised(rng.choice(POOL), rng)
            (parent / f"{number}.txt").write_bytes(text.encode())
        else:
            records = rng.choices(POOL, k=rng.randint(1, 5))
            lines = [json.dumps({"text": text + " " * rng.randint(0, 2)}) for text in records]
            (parent / f"{number}.jsonl").write_text("\n".join(lines))
    every = [path for path in folder.rglob("*") if path.is_file()]
    for number in range(4):
        target = rng.choice(every)
        rng.choice([os.symlink, os.link])(target, folder / f"link{number}{target.suffix}")
    for name in ("a/self", "b/up", "again"):
        if (folder / name).parent.is_dir():
            os.symlink(folder, folder / name)


def real_documents(pattern):
    """How many documents the real files of a glob have; `**` is at most four folders, no loop."""
    levels = range(5) if "**" in pattern else (0,)
    plain = [pattern.replace("/**/", "/" + "*/" * level) for level in levels]
    files = {os.stat(path)[1:3]: path for each in plain for path in glob.glob(each)}
    texts = (open(path, encoding="utf-8").read() for path in files.values() if isfile(path))
    return sum(len(text.splitlines()) if text.startswith("{") else 1 for text in texts)


# Cases A10, B1, B2, B3, B4
@pytest.mark.parametrize("seed", range(40))
def test_no_source_trains_on_what_another_holds_out(seed, tmp_path):
    rng, folder = random.Random(seed), tmp_path / "tree"
    folder.mkdir()
    make_tree(folder, rng)
    patterns = [f"{folder}/{p}" for p in PATTERNS if real_documents(f"{folder}/{p}") > 1]
    configs = [
        (f"s{i}", rng.choice(patterns), rng.choice(["", "", "", rng.choice(patterns)]))
        for i in range(rng.randint(1, 4))
    ]
    opened = open_all(tmp_path / "cache", *configs)
    evaluated = set().union(*map(contents, opened.eval.values()))
    prints = opened.fingerprint()
    for name, path, eval_path in configs:
        found = prints[name]
        counted = found["documents"] + found["excluded_documents"]
        if not eval_path:
            counted += found["eval_documents"]
        if opened.eval[name].span is None:
            assert counted == real_documents(path)
        try:
            train = opened.train[name]
        except UserError as error:
            assert f"data.sources.{name}.path" in str(error) and found["documents"] == 0
            continue
        assert len(train) == found["documents"] > 0
        assert not contents(train) & evaluated
        assert len({train.origin(i) for i in range(len(train))}) == len(train)


@pytest.mark.parametrize("seed", range(10))
def test_a_new_file_and_another_glob_move_no_document(seed, tmp_path):
    rng, folder = random.Random(seed), tmp_path / "tree"
    folder.mkdir()
    for number in range(30):
        path = folder / rng.choice("ab") / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {rng.random()}")
    first = open_all(tmp_path / "cache", ("it", f"{folder}/**/*.txt", ""))
    train, held = contents(first.train["it"]), contents(first.eval["it"])
    (smallest,) = sorted(train | held, key=lambda text: key_of(text.encode()))[:1]
    for pattern in ("*/*.txt", "a/*.txt", "**"):
        other = open_all(tmp_path / "cache", ("it", f"{folder}/{pattern}", ""))
        assert len(contents(other.eval["it"]) - held) <= 1  # the smallest of a part
        assert contents(other.train["it"]) <= train | {smallest}
    for number in range(20):
        (folder / "a" / f"new{number}.txt").write_text(f"new {rng.random()}")
    last = open_all(tmp_path / "cache", ("it", f"{folder}/**/*.txt", ""))
    assert held - contents(last.eval["it"]) <= {smallest}
    assert train <= contents(last.train["it"])


def test_choice_is_by_content_at_least_one_and_not_all():
    texts = [f"text {i}".encode() for i in range(50)] + [b"", b" \n"]
    keys = np.array([key_of(text) for text in texts])
    for fraction in (1e-9, 0.3, 1 - 1e-16):
        is_eval = held_out.choose(keys, keys, fraction)
        assert 1 <= is_eval.sum() < 50 and not is_eval[50:].any()
        shares = keys[:50] / 2.0**64
        expected = (shares < fraction) & (shares < shares.max()) | (shares == shares.min())
        assert (is_eval[:50] == expected).all()
    twice = np.concatenate([keys, keys])
    is_eval = held_out.choose(twice, twice, 0.3)
    assert (is_eval[:52] == is_eval[52:]).all()
    assert BLANK == keys[50] == keys[51] < UNREADABLE


def test_only_content():
    keys = np.array([key_of(text) for text in (b"", b"a", b" a\r\n", b"b")])
    assert held_out.only_content(keys[:3]) == 1
    assert held_out.only_content(keys) is held_out.only_content(keys[:1]) is None


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 0.999])
def test_a_tail_begins_at_a_line_or_between_characters(fraction):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab é漢😀\n ", k=rng.randint(2, 400))).encode()
        start = held_out.tail_start(text, fraction)
        if not start:
            continue
        head, tail = text[:start].decode(), text[start:].decode()
        assert head.strip() and tail.strip()
        length = max(1, round(fraction * len(text)))
        assert abs(len(text) - start - length) <= length * 0.25 + 4
        near = text[max(0, len(text) - length - length // 4) : len(text) - length + length // 4]
        assert head.endswith("\n") or b"\n" not in near
    lines = b"a line of text\n" * 1000
    assert held_out.tail_start(lines, 0.05) % 15 == 0
    assert held_out.tail_start(b"a", 0.5) == held_out.tail_start(b" \n", 0.5) == 0
