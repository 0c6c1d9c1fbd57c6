"""Programs: one line and status 2 for bad input, the answer alone on standard output."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.runtime import program

ROOT = Path(__file__).parents[2]

PROGRAM = '''
"""Does nothing, in several ways.

    python -m nothing --config=FILE
"""
import os, sys
from absl import flags, logging as absl_logging
import logging
from lightning_jax.runtime import program

CONFIG = program.define_config({default!r})
MODE = flags.DEFINE_string("mode", "answer", "What to do.")
MANY = flags.DEFINE_multi_string("many", [], "Several.")
WORKDIR = flags.DEFINE_string("workdir", "runs/a", "Folder of the run.")


def main(command="none"):
    config = program.load_config(CONFIG.value)
    if MODE.value == "fault":
        raise RuntimeError("our fault")
    if MODE.value == "interrupt":
        raise KeyboardInterrupt
    if MODE.value == "full":
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)
    print("noise")
    os.system("echo more noise")
    absl_logging.info("quiet")
    logging.getLogger("lightning_jax.x").info("progress")
    program.emit_json({{"D": config.model.model_dim, "command": command}})


if __name__ == "__main__":
    program.run(main, commands={commands!r})
'''


@pytest.fixture
def call(tmp_path):
    def run(*args, default=None, commands=(), **options):
        file = tmp_path / "nothing.py"
        file.write_text(PROGRAM.format(default=default, commands=commands).lstrip())
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(file), *args]
        options = {"stdout": subprocess.PIPE, **options}
        return subprocess.run(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **options
        )

    return run


def test_the_answer_is_alone_on_standard_output(call):
    result = call("--config.model.model_dim=64", "--config", "configs/base.py")
    assert result.returncode == 0
    assert result.stdout == '{\n  "D": 64,\n  "command": "none"\n}\n'
    assert result.stderr.split() == ["noise", "more", "noise", "progress"]


def test_a_text_of_the_config_may_be_empty_and_a_flag_of_several_values_given_often(call):
    arguments = ("--config.sample_prompt=", "--many=a", "--many=b", "--config", "configs/base.py")
    assert call(*arguments).returncode == 0


# Case F5
def test_of_overrides_the_last_one_counts_and_that_is_said(call):
    result = call(CONFIG, "--config.model.model_dim=32", "--config.model.model_dim=64")
    assert '"D": 64' in result.stdout
    said = "--config.model.model_dim is given 2 times: the last one counts"
    assert result.stderr.splitlines()[0] == said


def test_default_config_and_commands(call):
    options = {"default": "configs/base.py", "commands": ("rank", "serve")}
    result = call("rank", "--config.model.model_dim=32", **options)
    assert (result.returncode, '"command": "rank"' in result.stdout) == (0, True)
    result = call("rnak", **options)
    assert (
        result.stderr
        == "error: command 'rnak': must be one of rank, serve (did you mean \"rank\"?)\n"
    )
    assert result.returncode == 2


def test_help_shows_the_docstring_and_own_flags(call):
    result = call("--help", default="configs/base.py")
    assert result.returncode == 0
    assert result.stdout.startswith("Does nothing, in several ways.\n")
    assert "--mode: What to do. (default: answer)" in result.stdout
    assert "in place of PATH removes one. (default: configs/base.py)" in result.stdout
    assert "configs/base.py" in result.stdout.splitlines()[-1]
    assert "logtostderr" not in result.stdout


CONFIG = "--config=configs/base.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing: a file such as configs/quickstart.py"),
        (["--config.seed=1"], "--config is missing"),
        (
            ["--config=configs/bas.py"],
            '(did you mean "configs/base.py"?)',
        ),
        (
            [CONFIG, "--config.model.moe.topp=1"],
            "field model.moe.topp: did you mean --config.model.moe.top_p?",
        ),
        (
            [CONFIG, "--noconfig.model.scam"],
            "field model.scam: did you mean --config.model.scan?",
        ),
        (
            [CONFIG, "--config.model.model_dim=a"],
            "flag --config.model.model_dim=a: invalid literal",
        ),
        ([CONFIG, "--config.model.unit=gG"], "model.unit = 'gG': must be such that"),
        ([CONFIG, "--mod=x"], "Unknown command line flag 'mod'. Did you mean: mode"),
        ([CONFIG, "serve"], "unexpected argument 'serve': flags are written --name=value"),
        ([CONFIG, "--mode=interrupt"], "interrupted"),
        ([CONFIG, "--mode=full", "--workdir=runs/b"], "--workdir=runs/b: No space left on device"),
    ],
)
def test_bad_input_is_one_line(call, arguments, message):
    result = call(*arguments)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.returncode == (130 if "interrupt" in message else 2)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("def get_config(:", ":1: invalid syntax"),
        ("def get_config():\n    return 1 + 'a'", ":2: TypeError: unsupported operand"),
        (
            "from configs import base\nget_config = lambda: base.stage(tokenz=1)",
            ":2: KeyError: unknown stage field ['tokenz']",
        ),
        ("def get_config():\n    return 3", "config = 3: must be a mapping"),
    ],
)
def test_a_broken_config_file_is_one_line(call, tmp_path, lines, message):
    path = tmp_path / "broken.py"
    path.write_text(lines)
    result = call(f"--config={path}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_our_own_faults_keep_their_traceback(call):
    result = call(CONFIG, "--mode=fault")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "RuntimeError: our fault" in result.stderr


def test_a_full_standard_output_is_no_success(call):
    with open("/dev/full", "w") as full:
        result = call(CONFIG, stdout=full)
    assert result.returncode == 2
    assert result.stderr.endswith("error: standard output: No space left on device\n")


def chained(outer, inner):
    outer.__cause__ = inner
    return outer


# Case F2
@pytest.mark.parametrize(
    "number",
    [
        *(errno.EIO, errno.ENOENT, errno.ESTALE, errno.EMFILE, errno.ENOTDIR, errno.EISDIR),
        *(errno.ENAMETOOLONG, errno.EEXIST, errno.ELOOP, errno.EBUSY, errno.ETIMEDOUT),
    ],
)
def test_a_system_call_that_names_its_file_is_one_line(number):
    error = OSError(number, os.strerror(number), "/data/x.jsonl")
    message = f"/data/x.jsonl: {os.strerror(number)}"
    assert program.user_message(error) == message
    assert program.user_message(ExceptionGroup("g", [KeyError(1), error])) == message
    assert program.user_message(chained(RuntimeError("in a thread"), error)) == message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("two\nlines"), "two lines"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system"),
        (chained(RuntimeError("in a thread"), UserError("said")), "said"),
        (ExceptionGroup("several", [ValueError("a"), UserError("b")]), "b"),
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing "a/0.0" at "/runs/a/d/6a": Failed to write 9 '
                "bytes: No space left on device [os_error_code='28']"
            ),
            "/runs/a/d/6a: No space left on device",
        ),
        (
            ValueError('Failed "/x/y" [OS error 122: EDQUOT Disk quota]'),
            "/x/y: Disk quota exceeded",
        ),
        (ValueError("a fault"), None),
        (OSError("no number"), None),
        (OSError(errno.ENOTCONN, "a socket's"), None),
        (OSError(errno.EMFILE, "Too many open files"), "a file: Too many open files"),
        (OSError(errno.EIO, "Input/output error"), "a file: Input/output error"),
        (FileNotFoundError(errno.ENOENT, "No such file", b"/x\xff"), "/x\udcff: No such file"),
        (OSError(errno.ENOENT, "No such\nfile", "/a\nb"), "/a b: No such file"),
        (chained(RuntimeError("lost"), OSError(errno.ESTALE, "Stale", "/nfs/x")), "/nfs/x: Stale"),
        (ValueError('Failed "/x/y" [OS error 40: ELOOP]'), "/x/y: " + os.strerror(40)),
    ],
)
def test_which_exceptions_are_the_callers_to_mend(error, message):
    assert program.user_message(error) == message


def test_json_outside_of_a_program(capsys):
    values = {"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), 3: (True, None)}
    program.emit_json(values)
    expected = '{"a": 0.5, "b": [0, 1], "c": null, "3": [true, null]}'
    assert "".join(capsys.readouterr().out.split()) == "".join(expected.split())
