"""Saves checkpoints in processes whose save breaks at a chosen file call, and looks at them after.

python tests/checkpoint/broken_saves.py FOLDER kill|full POINTS

Saves checkpoint 2 over checkpoint 1, as many times as there are POINTS, each time with SIGKILL
before another file call, or with a disk that is full from that call on; the calls lie evenly over
those of a save. Prints one JSON object. Processes are forked from this one, which has imported
Orbax but started no thread of it.
"""

import errno
import gc
import json
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from lightning_jax.checkpoint import Checkpointer, all_steps, checkpoints_dir
from lightning_jax.checkpoint.library import orbax
from lightning_jax.config.errors import UserError

ADDING, OTHER = ("os.mkdir",), ("os.rename", "os.remove", "os.rmdir")
FULL = "No space left on device"


def state(step):
    w = np.arange(2000) + step
    return {"params": {"w": w, "v": w / 2}, "optimizer": {"mu": -w}}


def save(checkpointer, step):
    checkpointer.save(step, state(step), None, {"step": step})
    checkpointer.wait()


def check(checkpointer, workdir):
    """The newest checkpoint must be whole."""
    newest = all_steps(checkpoints_dir(workdir))[-1]
    found = checkpointer.restore(None, state(0))
    for item, tree in state(newest).items():
        for name, array in tree.items():
            np.testing.assert_array_equal(found[item][name], array)
    assert newest in (1, 2)


class Calls:
    """Numbers the calls that change files, and breaks at one of them."""

    def __init__(self, number, kind):
        self.number, self.kind, self.count, self.broken = number, kind, 0, False
        self._lock, self._fsync = threading.Lock(), os.fsync
        os.fsync = self._counted_fsync
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        writing = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writing or event in ADDING or event in OTHER:
            self._call(adding=event not in OTHER)

    def _counted_fsync(self, descriptor):
        self._call(adding=True)
        self._fsync(descriptor)

    def _call(self, adding):
        with self._lock:
            self.count += 1
            self.broken |= self.count == self.number
            if self.broken and self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        if self.broken and adding:
            raise OSError(errno.ENOSPC, FULL)


def break_at(number, kind, workdir):
    """Saves checkpoint 2; where the disk is full that is one line, and the next save works."""
    with Checkpointer(workdir, keep=1) as checkpointer:
        calls = Calls(number, kind)
        try:
            save(checkpointer, 2)
        except UserError as error:
            assert str(error).endswith(f"checkpoints: {FULL}"), error
        calls.broken = False
        (workdir / "calls").write_text(str(calls.count))
        check(checkpointer, workdir)
        save(checkpointer, 2)
    # A disk that fails after 2 has its number leaves 1 there too.
    assert sorted(path.name for path in checkpoints_dir(workdir).iterdir()) in (["2"], ["1", "2"])


def write_too_much(workdir):
    """Many arrays whose writes all fail, of which TensorStore reports each."""
    large = {f"w{i}": np.random.default_rng(i).random(1 << 16) for i in range(24)}
    with Checkpointer(workdir, keep=1) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        try:
            checkpointer.save(2, {"params": large, "optimizer": large}, None, {"step": 2})
            checkpointer.wait()
        except UserError as error:
            assert str(error).endswith("checkpoints: File too large"), error
        gc.collect()
        check(checkpointer, workdir)


def look(workdir):
    """What a kill has left must be whole, and the next save leaves itself alone."""
    with Checkpointer(workdir, keep=1) as checkpointer:
        check(checkpointer, workdir)
        save(checkpointer, 3)
    assert sorted(path.name for path in checkpoints_dir(workdir).iterdir()) == ["3"]


def in_child(work):
    """Runs `work` in a fork of this process; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def first_save(workdir):
    with Checkpointer(workdir, keep=1) as checkpointer:
        save(checkpointer, 1)


def main() -> None:
    root, kind, points = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    orbax()
    first, whole = root / "first", root / "whole"
    assert in_child(lambda: first_save(first)) == 0
    shutil.copytree(first, whole)
    assert in_child(lambda: break_at(None, kind, whole)) == 0
    calls, newest, bad = int((whole / "calls").read_text()), [], []
    if kind == "full":
        assert in_child(lambda: write_too_much(first)) == 0
    for number in np.unique(np.linspace(1, calls, points).astype(int)).tolist():
        workdir = root / str(number)
        shutil.copytree(first, workdir)
        status = in_child(lambda n=number, folder=workdir: break_at(n, kind, folder))
        newest.append(max(all_steps(checkpoints_dir(workdir))))
        good = status == (-signal.SIGKILL if kind == "kill" else 0)
        if not good or in_child(lambda folder=workdir: look(folder)):
            bad.append(number)
        shutil.rmtree(workdir)
    print(json.dumps({"calls": calls, "newest": newest, "bad": bad}))


if __name__ == "__main__":
    main()
