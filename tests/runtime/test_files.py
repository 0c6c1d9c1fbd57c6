import errno
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.runtime import files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.write_file(path, "one")

    def fail():
        with files.replacing(path) as file:
            file.write(b"tw")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "one" and [*tmp_path.iterdir()] == [path]
    files.write_file(path, b"two")
    assert path.read_bytes() == b"two"


# Case F13
def test_a_new_name_is_synced_after_its_content(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_replace(old, new):
        calls.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    files.write_file(tmp_path / "a.json", "{}")
    content, name, folder = calls
    assert (".a.json." in content, name, folder) == (True, "replace", str(tmp_path))


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.EINVAL, False), (errno.EACCES, False), (errno.EIO, True)]
)
def test_a_folder_is_synced_where_its_file_system_can(tmp_path, monkeypatch, number, refused):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if refused:
        with pytest.raises(OSError, match="Input/output"):
            files.sync_folder(tmp_path)
    else:
        files.sync_folder(tmp_path)


# Case F13
def test_leftovers_of_dead_writers_are_removed(tmp_path):
    alive = os.getppid()
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    left = [f".config.json.{child.pid}.1402.tmp", f".a b.{os.getpid()}.7.tmp", f".x.{2**70}.1.tmp"]
    kept = [f".run.json.{alive}.1402.tmp", ".config.json.tmp", "config.json", ".x.12.tmp"]
    for name in (*left, *kept):
        (tmp_path / name).write_text("{")
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    files.remove_leftovers(tmp_path / "absent")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert files.read_json(path) == {"a": 1} and len([*tmp_path.iterdir()]) == 1
    with pytest.raises(UserError, match="cannot write .*: No such file or directory"):
        files.write_json(tmp_path / "absent" / "a.json", {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b"\xff\xfe", r"not UTF-8 \(byte 0\)"),
        (b'{"a": NaN}', r"not JSON \(NaN is not a finite number\)"),
        (b'{"a": [-Infinity]}', "not JSON"),
        (b'{"a": 1e999}', "not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.json: {message}"):
        files.read_json(path)


def test_a_byte_order_mark_is_accepted_and_a_folder_is_one_line(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(UserError, match="Is a directory"):
        files.read_json(tmp_path, missing_ok=True)


def test_a_missing_file_is_an_error_or_empty(tmp_path):
    with pytest.raises(UserError, match="a.json: no such file"):
        files.read_json(tmp_path / "a.json")
    assert files.read_json(tmp_path / "a.json", missing_ok=True) == {}
    (tmp_path / "a.json").write_text(json.dumps({"x": None}))
    assert files.read_json(tmp_path / "a.json", missing_ok=True) == {"x": None}


def test_errors_of_tensorstore_name_the_system_call():
    error = ValueError("Error writing: [OS error 28: no space]")
    assert files.os_error_number(error) == 28 and files.os_error_number(ValueError("x")) is None
    with (
        pytest.raises(UserError, match="cannot save: No space left"),
        files.disk_errors("cannot save"),
    ):
        raise error


# Case F2
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "is a folder, must be a file"),
        ("none/x.json", "there is no folder '{home}/none'"),
        ("file/x.json", "there is no folder '{home}/file'"),
        ("x" * 300, "cannot be written (File name too long)"),
        # `replacing` needs a longer one for a while.
        ("x" * 240, "cannot be written (File name too long)"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        files.check_output("out", f"{tmp_path}/{name}")
    assert str(error.value) == f"out = '{tmp_path}/{name}': {reason.format(home=tmp_path)}"
    assert sorted(tmp_path.iterdir()) == before


# Case F2
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "'{home}/file' is not a folder"),
        ("file/run/a", "'{home}/file' is not a folder"),
        ("dangling/run", "'{home}/dangling' is not a folder"),
        ("x" * 300, "cannot be written (File name too long)"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, name, reason):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        files.check_output_folder("workdir", f"{tmp_path}/{name}")
    assert str(error.value) == f"workdir = '{tmp_path}/{name}': {reason.format(home=tmp_path)}"
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_that_can_be_written_are_checked_without_a_trace(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    files.check_output("out", tmp_path / "file")
    files.check_output("out", tmp_path / "new.json")
    files.check_output_folder("workdir", tmp_path)
    files.check_output_folder("workdir", tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    files.check_output("out", "new.json")
    files.check_output_folder("workdir", "runs/a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


# Case F2
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_output_is_found_before_the_work(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.Path, "write_bytes", refuse)
    for check in (files.check_output, files.check_output_folder):
        with pytest.raises(UserError, match=os.strerror(number)):
            check("out", tmp_path / "x")


# Case D3
def test_json_of_ours_has_no_number_that_is_not_finite(tmp_path):
    value = {1: (np.float32("nan"), [math.inf, {"a": -math.inf}]), "b": np.arange(2), "c": None}
    files.write_json(tmp_path / "a.json", value)
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert read == {"1": [None, [None, {"a": None}]], "b": [0, 1], "c": None}
