"""The frame of every program in `experiments/`: flags in, an answer or one line of error out.

Standard output belongs to answers: `emit_json` and `emit_text` write there, and everything else
that prints (libraries, progress, logs) goes to standard error. The exit status is 0 when the
program did its work, 2 for bad input (one line that starts with `error:`), 130 after an interrupt,
and 1 with a traceback for a fault of ours.
"""

from __future__ import annotations

import errno
import glob
import inspect
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, suggest
from lightning_jax.runtime.files import os_error_number, plain
from lightning_jax.runtime.huge_pages import restart_with_huge_pages

# The flags defined here belong to the program that asks for them.
flags.disclaim_key_flags()

_CONFIG = "config"
_OVERRIDE = re.compile(rf"--?(?:no)?{_CONFIG}\.([^=]*)")
_HELP = ("-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull")
_DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)
_default_config: str | None = None
_answers: int | None = None


def run(
    main: Callable[..., None], *, commands: Sequence[str] = (), huge_pages: bool = True
) -> None:
    """Parses the flags, calls `main()` and exits with the status of the module docstring.

    Args:
      main: the program. Called as `main(command)` if `commands` are given.
      commands: names; besides its flags the command line must hold exactly one of them.
      huge_pages: start the program again with huge pages where that helps (see `huge_pages`).
    """
    if any(argument in _HELP for argument in sys.argv[1:]):
        print(_help(commands))
        sys.exit(0)
    if huge_pages:
        restart_with_huge_pages()
    _reserve_stdout()
    _quiet_logging()
    try:
        main(*_arguments(commands))
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines `--config=FILE.py` and its overrides `--config.x.y=value`.

    Pass the flag's value to `load_config`.

    Args:
      default: the config file of a program that is called without `--config`.
    """
    global _default_config
    # Not given to absl, which would read the file here, where nothing can report its errors.
    _default_config = default
    return config_flags.DEFINE_config_file(
        _CONFIG, None, "config file; any of its fields: --config.x.y=value", lock_config=True
    )


def load_config(values: Any) -> RunConfig:
    """Builds the RunConfig from the value of the flag that `define_config` made.

    Raises:
      UserError: no config was given, it cannot be read, or `fields.build` refuses it.
    """
    if values is None:
        raise UserError("--config is missing: a file such as configs/quickstart.py")
    try:
        return build(RunConfig, values)
    except OSError as error:
        raise UserError(f"--config: {_one_line(error)}") from error


def emit_text(text: str, *, end: str = "\n") -> None:
    """Writes `text` and `end` to standard output, at once.

    Raises:
      UserError: standard output is closed or full.
    """
    data = memoryview((text + end).encode())
    try:
        if _answers is None:
            print(text, end=end, flush=True)
            return
        while data:
            data = data[os.write(_answers, data) :]
    except OSError as error:
        raise UserError(f"standard output: {error.strerror}") from error


def emit_json(value: Any) -> None:
    """Writes `value` as one JSON document to standard output.

    Scalars and arrays of numpy and jax become numbers and lists; NaN and infinities, which JSON
    does not have, become null.
    """
    emit_text(json.dumps(plain(value), indent=2, allow_nan=False))


def user_message(error: BaseException) -> str | None:
    """Returns the one-line message for an exception that the user can mend, else None.

    Searches the exception, its causes, and the members of exception groups.
    """
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return _one_line(cause)
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            return f"{_place(cause.filename)}: {cause.strerror or os.strerror(cause.errno)}"
        number = os_error_number(cause)
        if number in _DISK_ERRORS:
            path = re.search(r'"(/[^"]*)"', str(cause))
            return f"{_place(path and path[1])}: {os.strerror(number)}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    for member in getattr(error, "exceptions", ()):
        yield from _causes(member)
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)


def _place(path: Any) -> str:
    """Names the path of a failed system call; errors of writes carry no path."""
    if path:
        return str(path)
    known = ("workdir", "out")
    given = [f"--{k}={flags.FLAGS[k].value}" for k in known if k in flags.FLAGS]
    return " or ".join(given) or "a file"


def _one_line(error: BaseException) -> str:
    # str(KeyError) is the repr of its message; config_flags even takes the repr of that.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = str(text).replace("\\n", " ").replace("\\'", "'")
    return " ".join(text.split()) or type(error).__name__


def _arguments(commands: Sequence[str]) -> list[str]:
    """Parses sys.argv; returns the arguments of `main`."""
    path = _config_first()
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except Exception as error:  # the user can mend whatever a flag or a config file raises
        raise UserError(_flag_message(error, path)) from error
    if not commands:
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
        return []
    if len(rest) != 1 or rest[0] not in commands:
        given = " ".join(rest)
        raise UserError(f"command {given!r}: must be {suggest(given, commands)}")
    return rest


def _config_first() -> str | None:
    """Moves `--config=FILE`, or the default, before its overrides; returns the path of the file.

    config_flags reports overrides before `--config`, and a missing file, badly.
    """
    if _CONFIG not in flags.FLAGS:
        return None
    path, rest, arguments = _default_config, [], iter(sys.argv[1:])
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in (f"-{_CONFIG}", f"--{_CONFIG}"):
            rest.append(argument)
        else:
            path = value if "=" in argument else next(arguments, "")
    if path is None:
        if any(_OVERRIDE.match(argument) for argument in rest):
            load_config(None)
        return None
    file = path.split(":", 1)[0]
    if not os.path.isfile(file):
        near = glob.glob(os.path.join(os.path.dirname(file) or "configs", "[!_]*.py"))
        hint = f": {suggest(file, sorted(near))}" if near else ""
        raise UserError(f"--{_CONFIG}={path}: no such file{hint}")
    sys.argv[1:] = [f"--{_CONFIG}={path}", *rest]
    return file


def _flag_message(error: Exception, config_file: str | None) -> str:
    """Returns one line for any error of parsing flags or loading a config file."""
    chain: list[BaseException] = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    root = chain[-1]
    if isinstance(root, UserError):
        return _one_line(root)
    if isinstance(root, SyntaxError):
        return f"{root.filename}:{root.lineno}: {root.msg}"
    # An error inside the config file keeps its own words and line, not config_flags' traceback.
    own = os.path.abspath(config_file or "")
    for raised in reversed(chain):
        frames = traceback.extract_tb(raised.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == own]
        if lines:
            return f"{config_file}:{lines[-1]}: {type(raised).__name__}: {_one_line(raised)}"
    text = _one_line(error)
    if missing := re.match(r"flag --(\w+)=None: Flag --\w+ must have a value", text):
        return f"--{missing[1]} is missing"
    if isinstance(error, (KeyError, AttributeError)):
        return _unknown_field(text) or text
    return text


def _unknown_field(text: str) -> str | None:
    """Names the override that config_flags refused with the words `'key' ... Did you mean ...`."""
    key, near = re.search(r"'(\w+)", text), re.search(r'Did you mean "(\w+)"', text)
    for argument in sys.argv[1:]:
        found = _OVERRIDE.match(argument)
        if found and key and key[1] in found[1].split("."):
            hint = f' (did you mean "{near[1]}"?)' if near else ""
            return f"unknown config field {found[1]}: configs/base.py has every field{hint}"
    return None


def _help(commands: Sequence[str]) -> str:
    main = sys.modules["__main__"]
    lines = [inspect.cleandoc(main.__doc__ or ""), "", "Flags:"]
    if commands:
        lines[1:1] = ["", f"Commands: {', '.join(commands)}"]
    for flag in sorted(flags.FLAGS.get_key_flags_for_module(sys.argv[0]), key=lambda f: f.name):
        default = _default_config if flag.name == _CONFIG else flag.default
        default_text = f" (default: {default})" if default not in (None, "") else ""
        lines.append(f"  --{flag.name}: {_one_line_text(flag.help)}{default_text}")
    if _CONFIG in flags.FLAGS:
        lines.append("Every field of a config, with its unit and reason, is in configs/base.py.")
    return "\n".join(lines)


def _one_line_text(text: str) -> str:
    return " ".join((text or "").split())


def _reserve_stdout() -> None:
    """Keeps the real standard output for answers; file descriptor 1 becomes standard error."""
    global _answers
    sys.stdout.flush()
    _answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)


def _quiet_logging() -> None:
    """Shows our logs from INFO on, all others from WARNING on, on standard error."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("lightning_jax").setLevel(logging.INFO)
