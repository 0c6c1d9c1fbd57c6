import dataclasses
import gzip
import json
import pickle
import shutil
import sysconfig
from pathlib import Path

import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data import files, sources


def data_of(path, *, eval_path="", eval_fraction=0.2, text_field="text"):
    config = SourceConfig("it", str(path), str(eval_path))
    return DataConfig("bytes", (config,), text_field, eval_fraction, "concat", 0)


def open_one(path, split="train", **options):
    return getattr(sources.Sources.open(data_of(path, **options)), split)["it"]


def texts(path, split="train", **options):
    return list(open_one(path, split, **options).texts())


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
    every = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.txt"))
    assert sorted(origins["train"] + origins["eval"]) == every
    assert all(names == sorted(names) and names for names in origins.values())
    train = splits["train"]
    assert "sub/01.txt" in every and train[0]["text"].endswith("\r\n漢")
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
    every = open_one(f"{folder}/**/*.txt", eval_path="x").fingerprint
    assert every != open_one(f"{copy}/**", eval_path="x").fingerprint


def test_an_added_file_moves_no_other(folder):
    before = {open_one(f"{folder}/**/*.txt", "eval").origin(0)}
    (folder / "sub" / "new.txt").write_text("new")
    after = open_one(f"{folder}/**/*.txt", "eval")
    assert before <= {after.origin(i) for i in range(len(after))}


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_splits_have_a_document(folder, fraction):
    for split in sources.SPLITS:
        assert len(open_one(f"{folder}/**/*.txt", split, eval_fraction=fraction)) >= 1


def test_one_document_needs_an_eval_path(folder):
    path = folder / "00.txt"
    with pytest.raises(UserError, match="data.sources.it.eval_path"):
        for split in sources.SPLITS:
            open_one(path, split)
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
    source = open_one(path, eval_path=path, text_field="body")
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
    source = open_one(path, eval_path=path)
    assert source[0]["text"] == source[2]["text"] == "good"
    with pytest.raises(UserError, match=f"bad.jsonl, line 3: .*{reason}|{reason}"):
        source[1]
    with pytest.raises(UserError, match="bad.jsonl, line 3"):
        _ = source.fingerprint


def test_bad_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(UserError, match="a.txt: not UTF-8 at byte 3"):
        texts(tmp_path / "a.txt", eval_path="x")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}' * 99)[:-9])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not")
    (tmp_path / "d.array_record").write_bytes(b"not" * 99)
    for name in ("b.jsonl.gz", "c.parquet", "d.array_record"):
        with pytest.raises(UserError, match=f"{name}: not a ") as caught:
            texts(tmp_path / name, eval_path="x")
        assert "\n" not in str(caught.value)
    write_records(tmp_path / "e.parquet", "parquet")
    with pytest.raises(UserError, match="no such column.*body"):
        open_one(tmp_path / "e.parquet")


def test_nothing_there(tmp_path):
    field = "data.sources.it.path = "
    with pytest.raises(UserError, match=field + ".*none.*matches a file"):
        open_one(tmp_path / "none*.txt")
    with pytest.raises(UserError, match="to read a folder: .*/\\*\\*"):
        open_one(tmp_path)
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
    with pytest.raises(UserError, match=r"no_such is missing: pip install lightning_jax\[data\]"):
        files.optional_import("no_such.package")


def test_fingerprint_counts_both_splits(tmp_path):
    for letter, count in (("a", 40), ("b", 5)):
        (tmp_path / letter).mkdir()
        for i in range(count):
            (tmp_path / letter / f"{i}.txt").write_text(f"{letter}{i}é " * (i + 1))
    configs = tuple(SourceConfig(name, f"{tmp_path}/{name}/*.txt", "") for name in "ab")
    data = DataConfig("bytes", configs, "text", 0.2, "concat", 0)
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
