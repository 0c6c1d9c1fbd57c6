import json

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
