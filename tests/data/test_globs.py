"""Globs: what Python's own glob finds, each real file once, in bounded time."""

import glob
import os
import random

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.data import globs

PATTERNS = [
    "*",
    "**",
    "*.txt",
    "*/*.txt",
    "**/*.txt",
    "a/**/*",
    "a/**",
    "*/**/b/*",
    "**/**/c.txt",
    "**/[ab]/?.txt",
    "a/b.txt",
    "a/../b/*.txt",
    ".h/*",
    "**/.*",
    "none/**",
]


def names(pattern):
    return [file.name for file in globs.glob_files(str(pattern))[1]]


def make_tree(folder, rng, count=60):
    for _ in range(count):
        parts = rng.choices(["a", "b", "c", ".h"], k=rng.randint(0, 3))
        path = folder.joinpath(*parts, rng.choice("abc.") + rng.choice(["b.txt", ".txt", ".md"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_finds_what_pythons_glob_finds(pattern, tmp_path):
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        make_tree(folder, random.Random(seed))
        found = globs.glob_files(f"{folder}/{pattern}")[1]
        expected = filter(os.path.isfile, glob.glob(f"{folder}/{pattern}", recursive=True))
        assert {os.path.realpath(file.path) for file in found} == {*map(os.path.realpath, expected)}
        assert found == sorted(found)
        assert all(file.size == 4 and file.time for file in found)


def test_relative_patterns(tmp_path, monkeypatch):
    make_tree(tmp_path, random.Random(0))
    monkeypatch.chdir(tmp_path)
    assert names("**/*.txt") == names(tmp_path / "**/*.txt") == names("./**/*.txt")


# Case B3
def test_each_real_file_once_whatever_links_lead_to_it(tmp_path):
    top = tmp_path / "top"
    for name in ("lib/x.txt", "lib/deep/y.txt", "z.txt"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    plain = names(top / "**/*.txt")
    assert plain == ["lib/deep/y.txt", "lib/x.txt", "z.txt"]
    os.symlink(".", top / "self")
    os.symlink("lib", top / "lib64")
    os.symlink("lib/deep", top / "a")
    os.symlink("..", top / "lib" / "deep" / "up")
    os.symlink("../z.txt", top / "lib" / "another.txt")
    os.link(top / "z.txt", top / "lib" / "hard.txt")
    os.symlink("nowhere", top / "gone.txt")
    os.symlink("loop.txt", top / "loop.txt")
    assert names(top / "**/*.txt") == plain
    assert names(top / "**") == plain
    assert names(top / "*/*.txt") == ["a/y.txt", "lib/hard.txt", "lib/x.txt"]
    assert names(top / "lib64/**/*.txt") == ["deep/y.txt", "hard.txt", "x.txt"]
    os.symlink(top, tmp_path / "link")
    assert names(tmp_path / "link" / "**/*.txt") == plain


def test_links_cost_no_more_than_folders(tmp_path, monkeypatch):
    """Ten folders, each with ten links to all others: a walk of all paths would never end."""
    for i in range(10):
        (tmp_path / f"d{i}").mkdir()
        (tmp_path / f"d{i}" / "x.txt").write_text(str(i))
        for j in range(10):
            os.symlink(f"../d{j}", tmp_path / f"d{i}" / f"to{j}")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    assert names(tmp_path / "**/*.txt") == [f"d{i}/x.txt" for i in range(10)]
    assert len(listed) <= 2 * 11


def test_a_name_with_wildcards_is_itself_if_there_is_such_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    (tmp_path / "a1.txt").write_text("text")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]
    assert names(tmp_path / "a[12].txt") == ["a1.txt"]


@pytest.mark.parametrize("pattern", ["\0", "a\0/*", "\ud800", "\ud800/**/*", "", "/none/**", "["])
def test_names_that_no_file_can_have(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names(pattern) == []


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuse(folder):
        if folder.endswith("secret"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="secret: cannot be read .Permission denied"):
        names(tmp_path / "**/*.txt")


# Case E6
def test_names_that_are_not_text(tmp_path):
    odd = [b"latin\xe9.txt", "漢.txt".encode(), b"two\nlines.txt"]
    for name in odd:
        (tmp_path / os.fsdecode(name)).write_text("text")
    found = globs.glob_files(f"{tmp_path}/*.txt")[1]
    assert sorted(os.fsencode(file.name) for file in found) == sorted(odd)
    assert sorted(globs.encoded_name(file.name) for file in found) == sorted(odd)
    shown = {globs.shown_name(file.name) for file in found}
    assert shown == {"latin\\udce9.txt", "漢.txt", "two\\nlines.txt"}
