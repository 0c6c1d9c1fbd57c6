import dataclasses
import gzip
import json
import logging
import os
import pickle
import shutil
import sysconfig
from pathlib import Path

import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data import files, sources, text_files
from lightning_jax.data.index import key_of


def data_of(path, *, eval_path="", eval_fraction=0.2, text_field="text"):
    config = SourceConfig("it", str(path), str(eval_path), 1.0)
    return DataConfig("bytes", (config,), text_field, eval_fraction, "concat", 0, 1)


def open_one(path, split="train", **options):
    return getattr(sources.Sources.open(data_of(path, **options)), split)["it"]


def texts(path, split="train", **options):
    return list(open_one(path, split, **options).texts())


def every(path, **options):
    """All documents of a path: the eval split of an `eval_path` is all of it."""
    return open_one("-", "eval", eval_path=path, **options)


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        path = tmp_path / "text" / ("sub" if i % 2 else "") / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"document {i}\r\n漢".encode())
    return tmp_path / "text"


def test_text_files_split_is_disjoint_complete_and_in_order(folder):
    splits = {split: open_one(f"{folder}/**/*.txt", split) for split in sources.SPLITS}
    origins = {
        split: [d["origin"] for d in map(s.__getitem__, range(len(s)))]
        for split, s in splits.items()
    }
    names_there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.txt"))
    assert sorted(origins["train"] + origins["eval"]) == names_there
    assert all(names == sorted(names) and names for names in origins.values())
    train = splits["train"]
    assert "sub/01.txt" in names_there and train[0]["text"].endswith("\r\n漢")
    assert train.num_bytes == sum(len(t.encode()) for t in train.texts())
    assert sorted(train.hash_order()) == list(range(len(train)))


def test_fingerprint_is_of_names_and_contents_alone(folder, tmp_path):
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy)
    first = open_one(f"{folder}/**/*.txt")
    assert first.fingerprint == open_one(f"{copy}/**").fingerprint
    path = copy / first[0]["origin"]
    content = path.read_bytes()
    path.write_bytes(content.replace(b"document", b"tnemucod"))
    assert first.fingerprint != open_one(f"{copy}/**").fingerprint
    path.write_bytes(content)
    path.rename(path.with_name("renamed.txt"))
    assert every(f"{folder}/**/*.txt").fingerprint != every(f"{copy}/**").fingerprint


def test_an_added_file_moves_no_other(folder):
    before = {open_one(f"{folder}/**/*.txt", "eval").origin(0)}
    (folder / "sub" / "new.txt").write_text("new")
    after = open_one(f"{folder}/**/*.txt", "eval")
    assert before <= {after.origin(i) for i in range(len(after))}


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_splits_have_a_document(folder, fraction):
    for split in sources.SPLITS:
        assert len(open_one(f"{folder}/**/*.txt", split, eval_fraction=fraction)) >= 1


def test_one_document_with_an_eval_path(folder):
    path = folder / "00.txt"
    assert len(open_one(path, eval_path=folder / "02.txt")) == 1
    held_out = open_one(path, "eval", eval_path=folder / "02.txt")
    assert held_out[0] == {"text": "document 2\r\n漢", "origin": "02.txt"}


RECORDS = ["first", "zweite 漢\n", "", "\0 fourth", "fifth"]


def write_records(path, form):
    lines = "\n\n".join(json.dumps({"id": 1, "body": t}) for t in RECORDS).encode()
    if form == "jsonl":
        path.write_bytes(lines)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"id": [1] * len(RECORDS), "body": RECORDS})
        parquet.write_table(table, path, row_group_size=2)
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for text in RECORDS:
            is_json = form == "array_record json"
            writer.write((json.dumps({"body": text}) if is_json else text).encode())
        writer.close()


@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "parquet", "array_record json", "array_record text"]
)
def test_record_files(form, tmp_path):
    path = tmp_path / f"data.{form.split()[0]}"
    write_records(path, form)
    source = every(path, text_field="body")
    assert list(source.texts()) == RECORDS
    step = 2 if form.startswith("jsonl") else 1  # blank lines are counted, as an editor does
    assert source.origin(2) == f"{path.name}:{1 + 2 * step}"
    assert list(pickle.loads(pickle.dumps(source)).texts()) == RECORDS
    split = [texts(path, s, text_field="body", eval_fraction=0.4) for s in sources.SPLITS]
    assert sorted(sum(split, [])) == sorted(RECORDS) and all(split)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'["text"]', "must be a JSON object, not list"),
        (b'{"txt": "a"}', 'no field .*did you mean "txt"'),
        (b'{"text": 3}', "must be a string, not int"),
        (b'{"text": "\\ud800"}', "unpaired surrogate"),
        (b'{"text": "\xff"}', "not JSON"),
    ],
)
def test_bad_line_is_named_when_it_is_read(line, reason, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    source = every(path)
    assert source[0]["text"] == source[2]["text"] == "good"
    with pytest.raises(UserError, match=f"bad.jsonl, line 3: .*{reason}|{reason}"):
        source[1]
    with pytest.raises(UserError, match="bad.jsonl, line 3"):
        _ = source.fingerprint


def test_bad_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(UserError, match="a.txt: not UTF-8 at byte 3"):
        every(tmp_path / "a.txt")[0]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}' * 99)[:-9])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not")
    (tmp_path / "d.array_record").write_bytes(b"not" * 99)
    for name in ("b.jsonl.gz", "c.parquet", "d.array_record"):
        with pytest.raises(UserError, match=f"{name}: not a ") as caught:
            every(tmp_path / name)
        assert "\n" not in str(caught.value)
    write_records(tmp_path / "e.parquet", "parquet")
    with pytest.raises(UserError, match="no such column.*body"):
        open_one(tmp_path / "e.parquet")


def test_nothing_there(tmp_path):
    field = "data.sources.it.path = "
    with pytest.raises(UserError, match=field + ".*none.*matches a file"):
        open_one(tmp_path / "none*.txt")
    with pytest.raises(UserError, match="data.sources.it.eval_path"):
        open_one("x", "eval", eval_path=tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=field + ".*has no text"):
        open_one(tmp_path / "empty*")
    (tmp_path / "x.zip").write_text("x")
    with pytest.raises(UserError, match="x.zip is of no known kind: .txt"):
        open_one(tmp_path / "*")
    with pytest.raises(UserError, match='did you mean "stdlib:code"'):
        open_one("stdlib:cod")


def test_a_folder_is_its_files_of_known_kinds(folder, caplog):
    caplog.set_level(logging.INFO)
    (folder / "sub" / "a.jsonl").write_text('{"text": "a record"}\n' * 3)
    (folder / "picture.png").write_bytes(b"\0")
    (folder / ".hidden.txt").write_text("hidden")
    expected = [*every(f"{folder}/**/*.txt").texts(), *3 * ["a record"]]
    assert sorted(every(folder).texts()) == sorted(expected)
    line = "data.sources.it.eval_path: 12 .txt, 1 .jsonl; 1 files of other kinds are left out"
    assert line in caplog.messages


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A small standard library, so that the real one need not be parsed."""
    for i in range(30):
        doc = f'"""Module {i}."""\n' if i % 3 else ""
        (tmp_path / f"m{i}.py").write_text(f"{doc}x = {i}\n")
    for name in ("site-packages/a.py", "json/tests/b.py", "encodings/c.py", "_sysconfigdata_x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""Left out."""\n')
    (tmp_path / "latin.py").write_bytes(b'"""\xff"""')
    (tmp_path / "blank.py").write_bytes(b"")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_stdlib_code_and_docs_of_a_module_are_on_the_same_side(stdlib):
    origins = {}
    for kind in ("code", "docs"):
        for split in sources.SPLITS:
            source = open_one(f"stdlib:{kind}", split)
            origins[kind, split] = {source.origin(i) for i in range(len(source))}
            assert len(origins[kind, split]) == len(source) >= 1
    every = {f"m{i}.py" for i in range(30)}
    assert origins["code", "train"] | origins["code", "eval"] == every
    assert not origins["code", "train"] & origins["code", "eval"]
    assert origins["docs", "train"] <= origins["code", "train"]
    assert origins["docs", "eval"] <= origins["code", "eval"]
    assert origins["docs", "train"] | origins["docs", "eval"] == {
        f"m{i}.py" for i in range(30) if i % 3
    }
    assert "Module 1." in texts("stdlib:docs") + texts("stdlib:docs", "eval")


def test_real_stdlib_code():
    source = open_one("stdlib:code")
    origins = [source.origin(i) for i in range(len(source))]
    assert "json/decoder.py" in origins or "ast.py" in origins
    assert not any({"test", "tests", "site-packages"} & set(o.split("/")) for o in origins)
    root = Path(sysconfig.get_path("stdlib"))
    assert source[0]["text"].encode() == (root / origins[0]).read_bytes()


def test_missing_package_names_the_extra(monkeypatch):
    with pytest.raises(UserError, match=r"no_such is missing: pip install 'lightning_jax\[data\]'"):
        files.optional_import("no_such.package")


def test_fingerprint_counts_both_splits(tmp_path):
    for letter, count in (("a", 40), ("b", 5)):
        (tmp_path / letter).mkdir()
        for i in range(count):
            (tmp_path / letter / f"{i}.txt").write_text(f"{letter}{i}é " * (i + 1))
    configs = tuple(SourceConfig(name, f"{tmp_path}/{name}/*.txt", "", 1.0) for name in "ab")
    data = DataConfig("bytes", configs, "text", 0.2, "concat", 0, 1)
    opened = sources.Sources.open(data)
    prints = opened.fingerprint()
    assert list(prints) == list(opened.train) == list(opened.eval) == ["a", "b"]
    for name, count in (("a", 40), ("b", 5)):
        assert prints[name]["documents"] + prints[name]["eval_documents"] == count
        held_out = b"".join(text.encode() for text in opened.eval[name].texts())
        assert prints[name]["eval_bytes"] == len(held_out)
        assert len(prints[name]["fingerprint"]) == 64
    json.dumps(prints)
    other = sources.Sources.open(dataclasses.replace(data, eval_fraction=0.5)).fingerprint()
    assert other["a"] != prints["a"]


def open_many(*configs, eval_fraction=0.2):
    configs = tuple(SourceConfig(*config, 1.0) for config in configs)
    return sources.Sources.open(DataConfig("bytes", configs, "text", eval_fraction, "concat", 0, 1))


# Case B1
def test_two_globs_over_the_same_files_agree(tmp_path, caplog):
    for i in range(60):
        path = tmp_path / ("law" if i % 3 else "other") / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {i}")
    opened = open_many(("all", f"{tmp_path}/**/*.txt", ""), ("law", f"{tmp_path}/law/*.txt", ""))
    held_out = {text for source in opened.eval.values() for text in source.texts()}
    trained = {text for source in opened.train.values() for text in source.texts()}
    assert held_out and not held_out & trained and len(held_out | trained) == 60


# Case B2
def test_an_eval_path_inside_of_path_is_not_trained_on(tmp_path, caplog):
    for name in "abc":
        lines = [json.dumps({"text": f"{name} {i}"}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    with caplog.at_level("INFO", "lightning_jax"):
        opened = open_many(("it", f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl"))
        assert {text[0] for text in opened.train["it"].texts()} == {"b", "c"}
    assert "it: 40 of 120 documents are not trained on" in caplog.text
    print_ = opened.fingerprint()["it"]
    assert (print_["documents"], print_["excluded_documents"]) == (80, 40)
    every_one = open_many(("it", f"{tmp_path}/*.jsonl", f"{tmp_path}/*.jsonl"))
    with pytest.raises(UserError, match=r"data.sources.it.path = .*: nothing is left to train on"):
        every_one.train["it"]
    assert every_one.fingerprint()["it"]["documents"] == 0  # a source without weight may do so


# Case B4
def test_copies_of_a_text_are_on_one_side(tmp_path):
    copies = ["{}", "{}\n", "\n {}", "\ufeff{}", "{}\r\nend", "{}\nend"]
    for i in range(40):
        for number, copy in enumerate(copies):
            (tmp_path / f"{number}_{i}.txt").write_bytes(copy.format(f"text {i}").encode())
    source = {split: open_one(f"{tmp_path}/*.txt", split) for split in sources.SPLITS}
    origins = {s: {v.origin(i) for i in range(len(v))} for s, v in source.items()}
    for i in range(40):
        for same in ((0, 1, 2, 3), (4, 5)):
            assert sum({f"{n}_{i}.txt" for n in same} <= names for names in origins.values()) == 1


PLAY = "".join(f"SPEAKER {i}:\nA line that is spoken, é 漢.\n\n" for i in range(201))


# Case B5
@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet", "copies"])
def test_of_one_document_a_tail_is_held_out(form, tmp_path):
    path = tmp_path / f"input.{form}"
    if form == "txt":
        path.write_text(PLAY)
    elif form == "jsonl":
        path.write_text(json.dumps({"text": PLAY}) + "\n" + json.dumps({"text": " "}))
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": [PLAY]}), path)
    else:
        for name in ("input1.txt", "input2.txt"):
            (tmp_path / name).write_text(PLAY)
        path = tmp_path / "*.txt"
    opened = open_many(("it", str(path), ""), eval_fraction=0.05)
    train, held_out = opened.train["it"], opened.eval["it"]
    assert len(train) == len(held_out) == 1
    assert train[0]["text"] + held_out[0]["text"] == PLAY
    assert train[0]["text"].endswith("\n")
    assert held_out.num_bytes == len(held_out[0]["text"].encode())
    assert train.num_bytes + held_out.num_bytes == len(PLAY.encode())
    assert 0.03 < held_out.num_bytes / len(PLAY.encode()) < 0.07
    assert train.fingerprint != held_out.fingerprint
    assert list(pickle.loads(pickle.dumps(held_out)).texts()) == [held_out[0]["text"]]
    other = open_many(("it", str(path), ""), eval_fraction=0.1)
    assert other.fingerprint()["it"]["fingerprint"] != opened.fingerprint()["it"]["fingerprint"]


def test_a_document_held_out_in_part_is_trained_on_by_no_other_source(tmp_path):
    (tmp_path / "input.txt").write_text(PLAY)
    (tmp_path / "copy.txt").write_text(PLAY + "\n")
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    path = f"{tmp_path}/input.txt"
    assert key_of(PLAY.encode()) > 2**63  # its share is not below 0.2, so "all" trains on the rest
    both = open_many(("one", path, ""), ("all", f"{tmp_path}/*.txt", ""))
    assert not any("SPEAKER" in text for text in both.train["all"].texts())
    assert len(both.train["one"]) == 1
    tail = both.eval["one"][0]["text"]
    (tmp_path / "tail.jsonl").write_text(json.dumps({"text": tail}) + '\n{"text": "another"}')
    third = open_many(("one", path, ""), ("two", f"{tmp_path}/tail.jsonl", f"{tmp_path}/0.txt"))
    assert list(third.train["two"].texts()) == ["another"]
    twice = open_many(("one", path, ""), ("two", path, ""))  # both hold out the same tail
    assert list(twice.train["one"].texts()) == list(twice.train["two"].texts())
    apart = open_many(("one", path, f"{tmp_path}/copy.txt"))
    with pytest.raises(UserError, match="nothing is left"):
        apart.train["one"]


@pytest.mark.parametrize("text", ["a", "\n a \n", "漢"])
def test_a_single_text_too_short_for_a_tail(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    for split in sources.SPLITS:
        with pytest.raises(UserError, match="a.txt .*too short .*set data.sources.it.eval_path"):
            open_one(tmp_path / "a.txt", split)


def test_a_path_source_trains_on_no_module_that_the_standard_library_holds_out(stdlib):
    opened = open_many(
        ("code", "stdlib:code", ""), ("docs", "stdlib:docs", ""), ("path", f"{stdlib}/m*.py", "")
    )
    held_out = {o.origin(i) for o in opened.eval.values() for i in range(len(o))}
    for source in opened.train.values():
        assert not held_out & {source.origin(i) for i in range(len(source))}
    alone = open_many(("code", "stdlib:code", ""))
    same = (opened, alone)
    first, second = ([*map(o.eval["code"].origin, range(len(o.eval["code"])))] for o in same)
    assert first == second


# Case E6
def test_names_and_marks_that_are_not_text(tmp_path, monkeypatch):
    for number, name in enumerate([b"latin\xe9", b"two\nlines", "漢".encode()]):
        text = f"document {number}"
        (tmp_path / os.fsdecode(name + b".txt")).write_bytes(b"\xef\xbb\xbf" + text.encode())
        lines = json.dumps({"text": text + " x"}).encode()
        (tmp_path / os.fsdecode(name + b".jsonl")).write_bytes(b"\xef\xbb\xbf" + lines)
        (tmp_path / os.fsdecode(name + b".jsonl.gz")).write_bytes(gzip.compress(lines + b"\n\n1"))
    for _ in range(2):
        found = every(f"{tmp_path}/*.txt")
        assert sorted(found.texts()) == ["document 0", "document 1", "document 2"]
        assert found.num_bytes == 30
        assert sorted(every(f"{tmp_path}/*.jsonl").texts())[0] == "document 0 x"
        packed = every(f"{tmp_path}/*.gz")
        for i in range(0, 6, 2):
            assert packed[i]["text"].endswith(" x")
            with pytest.raises(UserError, match="line 3: must be a JSON object, not int") as caught:
                packed[i + 1]
            assert str(caught.value).isprintable()
    json.loads(json.dumps([found.origin(i) for i in range(3)]))
    os.remove(os.path.join(os.fsencode(tmp_path), b"latin\xe9.txt"))
    with pytest.raises(UserError, match=r"latin\\udce9.txt: cannot be read") as caught:
        list(found.texts())
    assert str(caught.value).isprintable()


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    opened, broken = text_files._content, []

    def content(path):
        if broken and str(path).endswith("3.txt"):
            raise OSError(24, "Too many open files")
        return opened(path)

    monkeypatch.setattr(text_files, "_content", content)
    broken.append(True)
    with pytest.raises(UserError, match="3.txt: cannot be read .Too many open files"):
        _ = every(f"{tmp_path}/*.txt").fingerprint
    broken.clear()
    assert every(f"{tmp_path}/*.txt").num_bytes == 9 * 6


def test_a_tokenizer_is_trained_on_what_is_left(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    path = f"{tmp_path}/1*.txt"
    opened = open_many(("only_evaluated", path, path), ("it", f"{tmp_path}/*.txt", ""))
    assert [source.name for source in opened.trained()] == ["it"]
    with pytest.raises(UserError, match="nothing is left"):
        open_many(("only_evaluated", path, path)).trained()
