"""A folder appears whole or not at all, and a kill does not stop the next try."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.runtime.folders import new_folder


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("exists", [False, True])
def test_it_takes_its_name_at_the_end(exists, tmp_path):
    path = tmp_path / "a" / "b"
    if exists:
        path.mkdir(parents=True)
    with new_folder(path, "path") as folder:
        (folder / "x").mkdir()
        (folder / "x" / "y").write_text("1")
        assert not (path / "x").exists()
    assert tree(tmp_path) == ["a", "a/b", "a/b/x", "a/b/x/y"]


# Case A13
@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), SystemExit(2)])
def test_a_failure_leaves_nothing(error, tmp_path):
    for path in (tmp_path / "a" / "b" / "c", tmp_path / "d"):
        with pytest.raises(type(error)), new_folder(path, "path") as folder:
            (folder / "x").write_text("1")
            raise error
    assert tree(tmp_path) == []


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link", "path") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").exists()


@pytest.mark.parametrize("name", ["a/b/" + "x" * 300, "a/" + "x" * 300 + "/b"])
def test_a_name_that_no_disk_takes_leaves_nothing(name, tmp_path):
    with pytest.raises(UserError, match="path = "), new_folder(tmp_path / name, "path"):
        raise AssertionError("entered")
    assert tree(tmp_path) == []


@pytest.mark.parametrize("kind", ["full", "file", "below a file"])
def test_what_is_there_is_not_touched(kind, tmp_path):
    path, before = tmp_path / "a", None
    if kind == "full":
        path.mkdir()
        (path / "x").write_text("1")
    else:
        path.write_text("1")
    before = tree(tmp_path)
    target = path / "b" if kind == "below a file" else path
    right = "is not empty" if kind == "full" else "cannot be written"
    with pytest.raises(UserError, match=f"^path = .*{right}") as caught, new_folder(target, "path"):
        raise AssertionError("entered")
    assert tree(tmp_path) == before and "\n" not in str(caught.value)


def test_who_comes_second_is_refused(tmp_path):
    with pytest.raises(UserError, match="not empty"), new_folder(tmp_path / "a", "path"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").write_text("1")
    assert tree(tmp_path) == ["a", "a/theirs"]


def test_the_next_try_removes_what_a_killed_one_left(tmp_path, caplog):
    program = (
        "import os, signal, sys; from lightning_jax.runtime.folders import new_folder\n"
        "with new_folder(sys.argv[1], 'path') as folder:\n"
        "    (folder / 'x').write_text('1'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")])
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    living = tmp_path / f".a.{os.getppid()}@{socket.gethostname()}.partial"
    foreign, other = tmp_path / ".a.1@elsewhere.partial", tmp_path / ".b.1@elsewhere.partial"
    for folder in (living, foreign, other):
        folder.mkdir()
    with new_folder(tmp_path / "a", "path"):
        pass
    assert tree(tmp_path) == sorted(["a", living.name, foreign.name, other.name])
    assert len(caplog.records) == 2 and "elsewhere" in caplog.text
