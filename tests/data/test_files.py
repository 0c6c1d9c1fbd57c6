"""Files of records: limits on what they make of themselves, and changes while they are in use."""

import errno
import gzip
import json
import os
import subprocess
import sys

import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data import files, index, text_files
from lightning_jax.data.sources import Sources

TEXTS = [f"document {i} " * 9 for i in range(9)]


def open_file(path, folder):
    data = DataConfig(
        "bytes", (SourceConfig("it", "-", str(path), 1.0),), "text", 0.2, "concat", 0, 1
    )
    return Sources.open(data, folder).eval["it"]


def write(path, texts):
    form = path.name.partition(".")[2]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if form == "txt":
        path.write_text(texts[0])
    elif form == "jsonl":
        path.write_bytes(lines)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif form == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), path, compression="gzip")
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for text in texts:
            writer.write(text.encode())
        writer.close()
    return path


FORMS = ["txt", "jsonl", "jsonl.gz", "parquet", "array_record"]


# Case E7
@pytest.mark.parametrize("form", FORMS)
def test_a_document_has_a_limit(form, tmp_path, monkeypatch):
    path = write(tmp_path / f"data.{form}", ["x" * 3000])
    for module in (files, text_files):
        monkeypatch.setattr(module, "LONGEST", 2000)
    with pytest.raises(UserError, match=f"data.{form}.*2,000") as caught:
        open_file(path, tmp_path / "cache")[0]
    assert len(str(caught.value)) < 300
    for module in (files, text_files):
        monkeypatch.setattr(module, "LONGEST", 3020)
    assert len(open_file(path, tmp_path / "cache2")[0]["text"]) == 3000


@pytest.mark.parametrize("lines", [1, 2000])
@pytest.mark.parametrize("form", ["jsonl.gz", "parquet"])
def test_what_a_small_file_inflates_to_has_a_limit(form, lines, tmp_path, monkeypatch):
    path = write(tmp_path / f"data.{form}", ["x" * (2 * 10**6 // lines)] * lines)
    assert path.stat().st_size < 20_000
    assert len(open_file(path, tmp_path / "cache")) == lines
    monkeypatch.setattr(files, "_ALWAYS", 1000)
    read, decompress = [], gzip.GzipFile.readline
    monkeypatch.setattr(
        gzip.GzipFile, "readline", lambda *a: read.append(decompress(*a)) or read[-1]
    )
    with pytest.raises(UserError, match=f"data.{form}.*inflates to more than 100 times") as caught:
        open_file(path, tmp_path / "other")
    assert sum(map(len, read)) <= 100 * path.stat().st_size + 1
    assert "\n" not in str(caught.value)
    assert not [*(tmp_path / "other").iterdir()]


def test_unpacking_leaves_room_on_the_disk(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl.gz", TEXTS)
    monkeypatch.setattr(index, "_DISK_RESERVE", 200)
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr(index.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="cannot be unpacked .*No space left.*XDG_CACHE_HOME"):
        open_file(path, tmp_path / "cache")
    usage.free = 1000
    assert [*open_file(path, tmp_path / "cache").texts()] == TEXTS


def test_records_are_asked_for_by_their_size():
    assert files._at_once(10**6, 10**4) == files._BATCH
    assert files._at_once(10**9, 2) == files._at_once(10**9, 0) == 1


def rewritten(path):
    path.write_bytes(path.read_bytes().replace(b"5", b"6"))


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


def deleted(path):
    path.unlink()


def swapped(path):
    path.unlink()
    path.mkdir()


# Case F2
@pytest.mark.parametrize("change", [rewritten, cut, deleted, swapped])
@pytest.mark.parametrize("form", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_a_file_that_changes_while_it_is_in_use_is_named(form, change, tmp_path):
    path = write(tmp_path / f"data.{form}", TEXTS[5:])
    source = open_file(path, tmp_path / "cache")
    is_packed = form in ("jsonl.gz", "parquet")
    used = next((tmp_path / "cache").glob("*.text")) if is_packed else path
    before = [*source.texts()]
    change(used)
    with pytest.raises(UserError, match=f"data.{form}") as caught:
        [*source.texts()]
    message = str(caught.value)
    assert message.isprintable()
    reasons = {"rewritten": "is not what it was", "cut": "is not what it was"}
    assert reasons.get(change.__name__, "cannot be read") in message
    if form != "txt":
        assert ("row 1" if form == "parquet" else "line 1") in message
    if is_packed and change is not swapped:
        if change is rewritten:  # of the same size: only a record that is read shows it
            path.touch()
        assert [*open_file(path, tmp_path / "cache").texts()] == before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_any_error_of_reading_is_a_line(form, code, tmp_path, monkeypatch):
    path = write(tmp_path / f"data.{form}", TEXTS)
    source = open_file(path, tmp_path / "cache")

    def refuse(*args, **options):
        raise OSError(code, os.strerror(code), args[0])

    if form == "array_record":
        monkeypatch.setattr(type(source.readers[0]._records), "__getitem__", refuse)
    for module in (files, text_files):
        monkeypatch.setattr(module, "open", refuse, raising=False)
    with pytest.raises(UserError, match=f"data.{form}.*cannot be read .*{os.strerror(code)}"):
        source[0]
    if form not in ("txt", "array_record"):
        with pytest.raises(UserError, match=f"data.{form}") as caught:
            open_file(path, tmp_path / "other") if form == "jsonl" else refuse_gzip(
                path, tmp_path, monkeypatch, refuse
            )
        assert os.strerror(code) in str(caught.value)


def refuse_gzip(path, tmp_path, monkeypatch, refuse):
    monkeypatch.setattr(files.gzip, "open", refuse)
    open_file(path, tmp_path / "other")


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path):
    path = write(tmp_path / "data.jsonl", TEXTS)
    open_file(path, tmp_path / "cache")
    status = path.stat()
    rewritten(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    source = open_file(path, tmp_path / "cache")
    with pytest.raises(UserError, match="line 6: is not what it was.*touch"):
        [*source.texts()]
    path.touch()
    assert len([*open_file(path, tmp_path / "cache").texts()]) == len(TEXTS)


_PEAK = """
import sys
from pathlib import Path
from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.data.packing import PackDataset, document_tokens
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import load_tokenizer

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

path, cache, tokenizer = sys.argv[1:]
tokenizer = load_tokenizer(tokenizer)
tokenizer.encode("warm up")
data = DataConfig("bytes", (SourceConfig("it", "-", path, 1.0),), "text", 0.2, "concat", 0, 1)
before = peak()
source = Sources.open(data, Path(cache)).eval["it"]
source.fingerprint

class Documents:
    def __len__(self): return 1
    def __getitem__(self, i): return document_tokens(source[i]["text"], tokenizer)

next(iter(PackDataset(Documents(), seq_len=64, packing="concat")))
print((peak() - before) / source.num_bytes)
"""


# Case E7
@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's VmHWM")
@pytest.mark.parametrize("form", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_a_large_document_takes_a_small_multiple_of_its_size(form, tmp_path):
    text = "".join(f"line {i} of a long text, one of many\n" for i in range(600_000))
    path = write(tmp_path / f"data.{form}", [text])
    command = [sys.executable, "-c", _PEAK, str(path), str(tmp_path / "cache"), "bytes"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(found.stdout) < (13 if form == "parquet" else 9)
