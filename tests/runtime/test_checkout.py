"""The commit that runs, or why it is not known."""

import os
import subprocess

import pytest

from lightning_jax.runtime import checkout as runtime_checkout
from lightning_jax.runtime.checkout import git_commit


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "file").write_text("one")
    who = ("-c", "user.name=x", "-c", "user.email=x@x")
    for command in (("init", "-q"), ("add", "file"), (*who, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def fake_git(folder, script, monkeypatch):
    (folder / "bin").mkdir()
    program = folder / "bin" / "git"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_the_commit_of_a_checkout(checkout, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    commit, reason = git_commit(checkout)
    assert len(commit) == 40 and reason is None
    (checkout / "file").write_text("two")
    assert git_commit(checkout) == (f"{commit}-dirty", None)


# Case F15: the reason is recorded, whatever it is.
def test_without_a_commit_the_reason_is_known(checkout, tmp_path, monkeypatch):
    inside = checkout / "site-packages"
    inside.mkdir()
    assert git_commit(inside) == (None, f"{inside} is not a git checkout")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert git_commit(checkout) == (None, "git is not installed")
    with monkeypatch.context() as patch:
        patch.setattr(runtime_checkout, "_GIT_SECONDS", 0.05)
        fake_git(tmp_path, "exec sleep 5", patch)
        commit, reason = git_commit(checkout)
        assert commit is None and "timed out" in reason
    refusal = "fatal: detected dubious ownership in repository at '/x'"
    (tmp_path / "bin" / "git").unlink()
    (tmp_path / "bin").rmdir()
    fake_git(tmp_path, f'echo "{refusal}" >&2; echo "more" >&2; exit 128', monkeypatch)
    assert git_commit(checkout) == (None, refusal)
