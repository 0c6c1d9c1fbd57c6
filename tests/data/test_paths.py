"""Files, folders and globs, and the kinds of files that are read."""

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.data.paths import find, in_words


@pytest.fixture
def folder(tmp_path):
    for name in ("a.txt", "b.md", "sub/c.py", "sub/d.jsonl.gz", "sub/e.bin", "sub/.f.txt", "g"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "empty").mkdir()
    return tmp_path / "texts"


def names(found):
    return [file.name for file in found.files]


def test_a_folder_stands_for_all_files_that_can_be_read(folder, monkeypatch):
    found = find("path", str(folder))
    assert names(found) == ["a.txt", "b.md", "sub/c.py", "sub/d.jsonl.gz"]
    assert found.left_out == 2 and found.root == folder
    assert in_words(found.files) == "1 .txt, 1 .md, 1 .py, 1 .jsonl.gz"
    assert find("path", f"{folder}/") == found
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find("path", "~/texts") == found


def test_a_file_and_a_glob_name_every_file(folder):
    assert names(find("path", f"{folder}/a.txt")) == ["a.txt"]
    assert names(find("path", f"{folder}/**/*.py")) == ["sub/c.py"]
    assert find("path", f"{folder}/*.md").left_out == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.txt", "^field = '.*none.txt': must be a path or a glob that matches a file$"),
        ("texts/sub/e.bin", "^field: .*e.bin is of no known kind: .txt, .md, .py, .jsonl, "),
        ("texts/*", "^field: .*g is of no known kind: .txt"),
        ("empty", "^field = '.*empty': must be a folder with files of a known kind: .txt, "),
    ],
)
def test_what_cannot_be_read_is_named(folder, path, message):
    with pytest.raises(UserError, match=message):
        find("field", f"{folder.parent}/{path}")
