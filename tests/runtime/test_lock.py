"""One process at a time: the lock ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.runtime import lock

ROOT = Path(__file__).resolve().parents[2]


def process(code, *arguments):
    """Starts Python with `hold`, `path` and `sys` at hand; `path` is the first argument."""
    setup = (
        "import os, sys, time; from pathlib import Path\n"
        "from lightning_jax.runtime import lock\n"
        "from lightning_jax.runtime.lock import hold\n"
        "path = Path(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", setup + code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def refused(path, message):
    """Tries to hold a lock, which must fail with one line."""
    with pytest.raises(UserError, match=message), lock.hold(path, "it"):
        pytest.fail("held twice")


def test_a_lock_names_its_holder_and_leaves_nothing(tmp_path):
    path = tmp_path / "lock"
    with lock.hold(path, "it"):
        note = json.loads(path.read_text())
        assert (note["pid"], note["host"]) == (os.getpid(), socket.gethostname())
        refused(path, rf"^it: in use by process {os.getpid()} on .* \(.+\)$")
        assert json.loads(path.read_text()) == note
    assert not list(tmp_path.iterdir())
    with lock.hold(path, "it"):
        pass


def test_a_link_to_the_folder_is_the_same_lock(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with lock.hold(tmp_path / "run" / "lock", "it"):
        refused(tmp_path / "link" / "lock", "in use by process")


def test_an_error_inside_releases_it(tmp_path):
    with pytest.raises(KeyError), lock.hold(tmp_path / "lock", "it"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_living_process_holds_and_that_of_a_killed_one_is_taken_over(tmp_path):
    path = tmp_path / "lock"
    other = process("with hold(path, 'it'): print('held', flush=True); sys.stdin.read()", path)
    assert other.stdout.readline() == "held\n"
    refused(path, rf"in use by process {other.pid} on {socket.gethostname()}")
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert path.exists()
    with lock.hold(path, "it"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


# Children of one process, which race for the same lock: exactly one has it at a time.
RACE = """
lock._WRITING_SECONDS = 0.0
count = path.parent / "count"
count.write_text("0")
children = []
for child in range(4):
    children.append(os.fork())
    if children[-1] == 0:
        had = 0
        while had < 25:
            try:
                with hold(path, "it"):
                    seen = int(count.read_text())
                    time.sleep(0.0002)
                    count.write_text(str(seen + 1))
                had += 1
            except lock.UserError:
                time.sleep(0.0001)
        os._exit(0)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_no_two_of_many_processes_ever_have_it(tmp_path):
    race = process(RACE, tmp_path / "lock")
    race.communicate(timeout=60)
    assert race.returncode == 0 and (tmp_path / "count").read_text() == "100"
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff\xfe", b"{" * 9000])
def test_whatever_stands_in_the_file_of_another_is_one_line(tmp_path, note):
    path = tmp_path / "lock"
    with open(path, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(note)
        other.flush()
        refused(path, "^it: in use by another process$")
    # What a killed process left is no obstacle.
    with lock.hold(path, "it"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_file_of_somebody_else_is_not_removed(tmp_path):
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.hold(path, "it"))
        (tmp_path / "run").rename(tmp_path / "moved")
        path.parent.mkdir()
        path.write_text("another's")
    assert path.read_text() == "another's"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), lock.hold(tmp_path / "lock", "it"):
        assert f"it: its disk has no locks ({os.strerror(number)})" in caplog.text


def test_a_file_that_cannot_be_written_raises(tmp_path):
    for path in (tmp_path / "none" / "lock", tmp_path):
        with pytest.raises(OSError), lock.hold(path, "it"):
            pass
