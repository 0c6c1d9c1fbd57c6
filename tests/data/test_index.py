"""Indexes of files: made in one pass, kept, checked, bounded in memory."""

import gzip
import json
import os
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data import cache, files, index, text_files
from lightning_jax.data.sources import Sources
from lightning_jax.runtime import phases

TEXTS = [f"document {i} with é and 漢 " * (i % 5) for i in range(40)]


def data_of(path, text_field="text"):
    source = SourceConfig("it", str(path), "", 1.0)
    return DataConfig("bytes", (source,), text_field, 0.2, "concat", 0, 1)


def write(path, texts=TEXTS, form=None):
    form = form or path.name.partition(".")[2]
    lines = "".join(json.dumps({"text": text, "id": 7}) + "\n" for text in texts).encode()
    if form == "jsonl":
        path.write_bytes(lines)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif form == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path)
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for text in texts:
            writer.write(json.dumps({"text": text}).encode())
        writer.close()
    return path


def open_all(path, folder, **options):
    """Opens both splits; returns the fingerprint and all texts in order."""
    sources = Sources.open(data_of(path, **options), folder)
    splits = sources.train["it"], sources.eval["it"]
    pairs = [(int(s.members[i]), s[i]["text"]) for s in splits for i in range(len(s))]
    return sources.fingerprint(), [text for _, text in sorted(pairs)]


@pytest.fixture
def passes(monkeypatch):
    """Names of the files that were read from one end to the other."""
    seen, watched, read = [], index.IndexStore._watched, text_files._read

    def watch(self, entries, path):
        seen.append(path.name)
        return watched(self, entries, path)

    def read_text(path):
        seen.append(os.path.basename(path))
        return read(path)

    monkeypatch.setattr(index.IndexStore, "_watched", watch)
    monkeypatch.setattr(text_files, "_read", read_text)
    return seen


FORMS = ["jsonl", "jsonl.gz", "parquet", "array_record"]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_once_and_again_only_when_it_changes(form, tmp_path, passes):
    path, folder = write(tmp_path / f"data.{form}"), tmp_path / "cache"
    first = open_all(path, folder)
    assert first[1] == TEXTS and passes == [path.name]
    assert first[0]["it"]["bytes"] + first[0]["it"]["eval_bytes"] == len("".join(TEXTS).encode())
    assert open_all(path, folder) == first
    assert len(passes) == 1

    changed = [*TEXTS[:-1], TEXTS[-1].swapcase()]
    status = path.stat()
    write(path, changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = open_all(path, folder)
    assert second[1] == changed and len(passes) == 2
    assert second[0]["it"]["fingerprint"] != first[0]["it"]["fingerprint"]

    write(path, TEXTS[:20])
    same_size = path.stat().st_size == status.st_size  # array_record fills up blocks
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 2 * same_size))
    assert open_all(path, folder)[1] == TEXTS[:20] and len(passes) == 3


def test_the_plain_file_is_not_opened_at_a_second_start(tmp_path, monkeypatch):
    path, folder = write(tmp_path / "data.jsonl"), tmp_path / "cache"
    prints = Sources.open(data_of(path), folder).fingerprint()
    path.chmod(0)
    monkeypatch.setattr(files, "open", lambda *args: pytest.fail("opened"), raising=False)
    assert Sources.open(data_of(path), folder).fingerprint() == prints


def test_one_pass_serves_all_sources_and_splits_of_a_start(tmp_path, passes):
    path = write(tmp_path / "data.jsonl")
    configs = (
        SourceConfig("one", str(path), "", 1.0),
        SourceConfig("two", f"{tmp_path}/*.jsonl", "", 1.0),
    )
    sources = Sources.open(
        DataConfig("bytes", configs, "text", 0.2, "concat", 0, 1), tmp_path / "no"
    )
    sources.fingerprint()
    assert passes == ["data.jsonl"]
    assert sources.train["one"] is sources.train["one"]
    assert len(sources.train["two"]) + len(sources.eval["two"]) == len(TEXTS)


def test_another_field_is_another_index_and_another_name_is_not(tmp_path, passes):
    (tmp_path / "sub").mkdir()
    path, folder = tmp_path / "sub" / "data.jsonl", tmp_path / "cache"
    path.write_text("".join(json.dumps({"a": f"a{i}", "b": f"b{i}"}) + "\n" for i in range(9)))
    assert open_all(path, folder, text_field="a")[1][3] == "a3"
    assert open_all(path, folder, text_field="b")[1][3] == "b3"
    sources = Sources.open(data_of(f"{tmp_path}/*/*.jsonl", "a"), folder)
    assert sources.train["it"].origin(0).startswith("sub/data.jsonl:")
    assert len(passes) == 2


def damages(content):
    yield b""
    yield content[:-1]
    yield content[: len(content) // 2]
    yield content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    yield b"{}\n" + content
    yield content.replace(b'"ends"', b'"dens"')
    yield content.replace(b'"<i8"', b'"<q9"')


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz"])
def test_a_damaged_index_is_made_again(form, tmp_path, passes):
    path, folder = write(tmp_path / f"data.{form}"), tmp_path / "cache"
    first = open_all(path, folder)
    (kept,) = folder.glob("*.index")
    whole = kept.read_bytes()
    for number, content in enumerate(damages(whole), 2):
        kept.write_bytes(content)
        assert open_all(path, folder) == first
        assert len(passes) == number
        assert kept.read_bytes() == whole


def test_unpacked_text_that_is_gone_or_cut_is_unpacked_again(tmp_path, passes):
    path, folder = write(tmp_path / "data.jsonl.gz"), tmp_path / "cache"
    first = open_all(path, folder)
    (texts,) = folder.glob("*.text")
    assert texts.read_text() == "".join(TEXTS)
    texts.unlink()
    assert open_all(path, folder) == first
    texts.write_bytes(texts.read_bytes()[:-1])
    assert open_all(path, folder) == first
    assert len(passes) == 3


@pytest.mark.parametrize("form", FORMS)
def test_without_a_folder_everything_works_as_well(form, tmp_path, monkeypatch, passes):
    path = write(tmp_path / f"data.{form}")
    first = open_all(path, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    for number, home in enumerate((str(tmp_path / "file"), "no/home"), 2):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert open_all(path, None) == first
        assert len(passes) == number
    assert not (tmp_path / "no").exists()
    source = Sources.open(data_of(path)).train["it"]
    assert list(pickle.loads(pickle.dumps(source)).texts()) == list(source.texts())


def test_no_room_to_unpack_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl.gz")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "replacing", full)
    with pytest.raises(UserError, match="cannot be unpacked .*No space left.*XDG_CACHE_HOME"):
        open_all(path, tmp_path / "cache")


@pytest.mark.parametrize("form", FORMS)
def test_starts_at_one_time_agree(form, tmp_path):
    path, folder = write(tmp_path / f"data.{form}"), tmp_path / "cache"
    with ThreadPoolExecutor(6) as pool:
        results = [*pool.map(lambda _: open_all(path, folder), range(12))]
    assert all(result == results[0] for result in results) and results[0][1] == TEXTS
    assert not [*folder.glob("*.tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
def test_memory_is_bounded(form, tmp_path):
    """40 MB of text: less than a tenth is ever held, and after the start next to nothing."""
    text = "a line of some length and 漢 in it\n" * 300
    path = write(tmp_path / f"data.{form}", [f"{i} {text}" for i in range(4000)])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    sources = Sources.open(data_of(path), tmp_path / "cache")
    assert sources.fingerprint()["it"]["bytes"] > 30e6
    held, peak = (n - before for n in tracemalloc.get_traced_memory())
    source = sources.train["it"]
    for i in range(0, len(source), 97):
        assert source[i]["text"].endswith(text)
    later = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert peak < 4e6
    assert held < 0.5e6 and later < 0.5e6


@pytest.mark.slow
def test_parquet_is_decoded_in_pieces(tmp_path):
    """One row group as large as the file, outside of what Python counts."""
    pyarrow = pytest.importorskip("pyarrow")
    text = "words that compress well " * 400
    path = write(tmp_path / "data.parquet", [f"{i} {text}" for i in range(8000)])
    sources, pool = Sources.open(data_of(path), tmp_path / "cache"), pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    peaks, entries = [], files.ParquetFile._entries
    for _ in entries(path, "text"):
        peaks.append(pool.bytes_allocated() - before)
    assert len(peaks) == 8000 and max(peaks) < 40e6
    assert sources.fingerprint()["it"]["bytes"] > 60e6


def test_a_bad_record_of_an_unpacked_file_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n\n{"text": 1}\n{"text": "b"}\n'))
    for _ in range(2):
        config = SourceConfig("it", "-", str(path), 1.0)
        data = DataConfig("bytes", (config,), "text", 0.2, "concat", 0, 1)
        source = Sources.open(data, tmp_path / "cache").eval["it"]
        assert source[0]["text"] == "a" and source[2]["text"] == "b"
        with pytest.raises(UserError, match="data.jsonl.gz, line 3: .*must be a string, not int"):
            source[1]
        with pytest.raises(UserError, match="line 3"):
            _ = source.num_bytes


def test_a_null_in_parquet_is_named(tmp_path):
    path = write(tmp_path / "data.parquet", ["a", None, "c"])
    source = Sources.open(data_of(path), tmp_path / "cache")
    with pytest.raises(UserError, match="row 2: .*must be a string, not NoneType"):
        source.fingerprint()


def test_the_index_itself(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"text": "one"}\n \n\t\n{"text": 2}\n{"text": "\xc3\xa9"}  ')
    found = index.build(files._json_lines(path, "text", open))
    assert found.size.tolist() == [3, -1, 2]
    assert [found.number(i) for i in range(3)] == [2, 5, 6]
    assert found.ends.tolist() == [0, 17, 33, path.stat().st_size]
    keys = [index.key_of(b"one"), index.UNREADABLE, index.key_of("é".encode())]
    np.testing.assert_array_equal(found.key, keys)
    empty = index.build([])
    assert len(empty) == 0 and empty.ends.tolist() == [0]


def test_long_passes_say_how_far_they_are(tmp_path, monkeypatch):
    details = []
    monkeypatch.setattr(phases, "detail", details.append)
    open_all(write(tmp_path / "data.jsonl"), tmp_path / "cache")
    assert details and all("data.jsonl" in text and "GB of text" in text for text in details)


def test_text_files_are_read_again_only_where_they_changed(tmp_path, passes):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"text {i}")
    first = open_all(f"{folder}/*.txt", tmp_path / "cache")
    assert len(passes) == 30
    assert open_all(f"{folder}/*.txt", tmp_path / "cache") == first
    assert len(passes) == 30
    (folder / "03.txt").write_text("more text")
    (folder / "04.txt").unlink()
    (folder / "99.txt").write_text("new")
    second = open_all(f"{folder}/*.txt", tmp_path / "cache")
    assert sorted(passes[30:]) == ["03.txt", "99.txt"]
    assert second[1] == [p.read_text() for p in sorted(folder.iterdir())]
    assert second == open_all(f"{folder}/*.txt", tmp_path / "other")
    assert len([*(tmp_path / "cache").iterdir()]) == 1


def test_mixed_kinds_keep_the_order_of_names(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("a.txt", "b.md", "d.txt"):
        (folder / name).write_text(name)
    write(folder / "c.jsonl", ["c1", "c2"])
    for _ in range(2):
        assert open_all(f"{folder}/*", tmp_path / "cache")[1] == [
            "a.txt",
            "b.md",
            "c1",
            "c2",
            "d.txt",
        ]


def test_arrays_round_trip_and_an_empty_name_is_nothing(tmp_path):
    arrays = {"a": np.arange(5), "b": np.empty(0), "c": np.arange(3, dtype=np.uint8)}
    assert cache.save_arrays(tmp_path / "x" / "arrays", arrays)
    found = cache.load_arrays(tmp_path / "x" / "arrays")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert cache.load_arrays(tmp_path / "none") is None
    assert not cache.save_arrays(Path("/proc/none/arrays"), arrays)
