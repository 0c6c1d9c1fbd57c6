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


# Case D3
def test_json_of_ours_has_no_number_that_is_not_finite(tmp_path):
    value = {1: (np.float32("nan"), [math.inf, {"a": -math.inf}]), "b": np.arange(2), "c": None}
    files.write_json(tmp_path / "a.json", value)
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert read == {"1": [None, [None, {"a": None}]], "b": [0, 1], "c": None}
