"""Commands in messages are those that work where the user is."""

import shlex
import sys
from pathlib import Path

import pytest

from lightning_jax.runtime import invocation, shipped

BIN = Path(sys.executable).parent


@pytest.fixture
def in_checkout(monkeypatch):
    monkeypatch.chdir(shipped.root())
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "pytest"])


@pytest.fixture
def by_script(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_a_command_is_one_that_a_shell_takes_apart_again(in_checkout):
    flags = ["--workdir=runs/a b", "--config.sample_prompt=it's"]
    line = invocation.command("train", *flags)
    assert shlex.split(line) == ["python", "-m", "experiments.train", *flags]


def test_elsewhere_it_is_the_console_script(by_script):
    assert invocation.command("train", "--seed=1") == "lightning-jax train --seed=1"


def test_who_has_called_the_script_is_told_of_the_script(in_checkout, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "/bin/lightning-jax", "train"])
    assert invocation.command("train") == "lightning-jax train"


def test_what_no_shell_finds_has_its_path(in_checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(invocation.command("train"))[0] in (
        sys.executable,
        ".venv/bin/python",
    )
    monkeypatch.chdir(BIN.parent.parent)
    inside = str(BIN.relative_to(BIN.parent.parent))
    assert invocation.tool("pytest", "x") == f"{inside}/pytest x"
    monkeypatch.chdir(tmp_path)
    assert invocation.tool("pytest") == f"{BIN}/pytest"
    assert invocation.tool("no_such_tool") == "no_such_tool"


def test_extras_are_quoted():
    assert invocation.install("data") == "pip install 'lightning_jax[data]'"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/a b/experiments/train.py", "--x=a b"], "python -m experiments.train '--x=a b'"),
        (["/lightning_jax/shipped/experiments/train.py", "-x"], "lightning-jax train -x"),
        (["mine.py", "a b"], "mine.py 'a b'"),
        ([], ""),
    ],
)
def test_a_recorded_command_has_no_path_of_its_machine(argv, line):
    assert invocation.recorded(argv) == line


def test_help_is_in_the_words_of_the_caller(in_checkout, tmp_path, monkeypatch):
    text = "    python -m experiments.train --config=configs/x.py"
    assert invocation.as_called(text) == text
    monkeypatch.chdir(tmp_path)
    assert invocation.as_called(text) == "    lightning-jax train --config=configs/x.py"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            [sys.executable, "-m", "experiments.train", "--workdir=runs/a b"],
            "python -m experiments.train '--workdir=runs/a b'",
        ),
        ([sys.executable, "/x/bin/lightning-jax", "train", "-x"], "lightning-jax train -x"),
        (["python", "own.py", "a b"], "python own.py 'a b'"),
        (["python", "-m", "ipykernel_launcher", "-f", "kernel.json"], None),
        (["python", "-m", "colab_kernel_launcher", "-f", "kernel.json"], None),
    ],
)
def test_a_command_is_given_again_as_it_was_typed(argv, expected, in_checkout, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", argv)
    assert invocation.typed() == expected
