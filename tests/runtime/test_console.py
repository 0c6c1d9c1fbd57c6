"""The list of programs, and the start of one."""

import subprocess
import sys

import pytest

from lightning_jax.runtime import console, shipped


@pytest.fixture
def answer(monkeypatch, capsys):
    def of(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightning-jax", *arguments])
        console.main()
        return capsys.readouterr().out

    return of


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_program_it_lists_them(answer, arguments):
    text = answer(*arguments)
    for name, line in shipped.programs().items():
        assert f"  {name} " in text and line in text
    assert "ablation, base, imported, " in text and "one of balance, " in text


def test_version(answer):
    assert answer("--version") == f"lightning_jax {shipped.version()}\n"


def test_a_program_runs_as_itself():
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "train", "--help"],
        cwd=shipped.root(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("Train a run")
    assert "\n  --workdir: Folder of the run.\n" in done.stdout


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("trian", "error: program 'trian': must be one of aot_compile, "),
        ("trian", '(did you mean "train"?)'),
        ("--config=small", "error: program '--config=small': must be one of "),
        ("../x", "error: program '../x': must be one of "),
        ("", "error: program '': must be one of "),
    ],
)
def test_an_unknown_program_is_one_line(answer, capsys, name, part):
    with pytest.raises(SystemExit) as ended:
        answer(name)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and part in line and line.count("\n") == 1


def test_what_needs_a_checkout_says_so(answer, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "root", lambda: tmp_path)
    with pytest.raises(SystemExit) as ended:
        answer("benchmark")
    assert ended.value.code == 2 and "benchmark needs a checkout" in capsys.readouterr().err
