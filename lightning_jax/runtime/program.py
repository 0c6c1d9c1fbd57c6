"""The frame of every program in `experiments/`: flags in, an answer or one line of error out.

Standard output belongs to answers: `emit_json` and `emit_text` write there, and everything else
that prints (libraries, progress, logs) goes to standard error, as far as that works (`output`). The
exit status is 0 when the program did its work, 2 for bad input (one line that starts with
`error:`), 130 after an interrupt, and 1 with a traceback for a fault of ours.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from lightning_jax.config.errors import UserError
from lightning_jax.runtime import command_line, interrupts, invocation, output
from lightning_jax.runtime.command_line import (
    define_changes,
    define_config,
    define_out,
    define_routing,
    define_step,
    load_config,
    names,
    numbers,
    one_line,
)
from lightning_jax.runtime.files import check_output, os_error_number, plain, write_json
from lightning_jax.runtime.huge_pages import restart_with_huge_pages
from lightning_jax.runtime.phases import phase

# The flags defined here belong to the program that asks for them.
flags.disclaim_key_flags()

__all__ = [
    "check_out",
    "define_changes",
    "define_config",
    "define_out",
    "define_routing",
    "define_step",
    "emit_json",
    "emit_text",
    "load_config",
    "loading",
    "names",
    "numbers",
    "run",
    "user_message",
]

_HELP = ("-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull")
# Errors of calls that do not name their file, and that are never a fault of the program.
_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
)


def run(
    main: Callable[..., None],
    *,
    commands: Sequence[str] = (),
    operands: Sequence[str] = (),
    huge_pages: bool = True,
) -> None:
    """Parses the flags, calls `main()` and exits with the status of the module docstring.

    Args:
      main: the program. Called as `main(command)` if `commands` are given.
      commands: names; besides its flags the command line must hold exactly one of them.
      operands: what else the command line must hold besides its flags, such as "FOLDER"; `main` is
        called with them.
      huge_pages: start the program again with huge pages where that helps (see `huge_pages`).
    """
    asks_for_help = any(argument in _HELP for argument in sys.argv[1:])
    if huge_pages and not asks_for_help:
        restart_with_huge_pages()
    output.reserve_stdout()
    interrupts.listen()
    _quiet_logging()
    try:
        if asks_for_help:
            emit_text(_help(commands))
        else:
            main(*command_line.arguments(commands, operands))
    except KeyboardInterrupt:
        interrupts.say_interrupted()
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """A block of imports, which may take long: it says so, and an interrupt ends it at once."""
    with interrupts.at_once(), phase("loading jax"):
        yield


def emit_text(text: str, *, end: str = "\n") -> None:
    """Writes `text` and `end` to standard output, at once.

    Raises:
      UserError: standard output is closed or full.
    """
    try:
        output.write_answer(text + end)
    except OSError as error:
        raise UserError(f"standard output: {error.strerror}") from error


def check_out(out: flags.FlagHolder) -> None:
    """Makes sure, before any work, that the file of `--out` can be written, if it was given.

    Raises:
      UserError: it cannot.
    """
    if out.value is not None:
        check_output(out.name, out.value)


def emit_json(value: Any, out: flags.FlagHolder | None = None) -> None:
    """Writes `value` as one JSON document to standard output, and first to the file of `--out`.

    Scalars and arrays of numpy and jax become numbers and lists; NaN and infinities, which JSON
    does not have, become null.
    """
    if out is not None and out.value is not None:
        write_json(out.value, value)
    emit_text(json.dumps(plain(value), indent=2, allow_nan=False))


def user_message(error: BaseException) -> str | None:
    """Returns the one-line message for an exception that the user can mend, else None.

    Searches the exception, its causes, and the members of exception groups.
    """
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return one_line(cause)
        if isinstance(cause, OSError) and (message := _system_message(cause)):
            return message
        number, path = os_error_number(cause), re.search(r'"(/[^"]*)"', str(cause))
        if number is not None and (path or number in _DISK_ERRORS):
            return f"{_place(path and path[1])}: {os.strerror(number)}"
    return None


def _system_message(error: OSError) -> str | None:
    """Returns `file: reason` for a failed system call that names its file, or whose disk failed."""
    if error.errno is None or (error.filename is None and error.errno not in _DISK_ERRORS):
        return None
    name = error.filename
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    return one_line(f"{_place(name)}: {error.strerror or os.strerror(error.errno)}")


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
    values = {name: flags.FLAGS[name].value for name in known if name in flags.FLAGS}
    return " or ".join(f"--{name}={value}" for name, value in values.items() if value) or "a file"


def _help(commands: Sequence[str]) -> str:
    main = sys.modules["__main__"]
    lines = [invocation.as_called(inspect.cleandoc(main.__doc__ or "")), "", "Flags:"]
    if commands:
        lines[1:1] = ["", f"Commands: {', '.join(commands)}"]
    if command_line.takes_changes:
        lines.append(f"  --{command_line.CONFIG}.x.y: Any field of the config, for every arm.")
    for flag in sorted(flags.FLAGS.get_key_flags_for_module(sys.argv[0]), key=lambda f: f.name):
        is_config = flag.name == command_line.CONFIG
        default = command_line.default_config if is_config else flag.default
        default_text = f" (default: {default})" if default not in (None, "") else ""
        lines.append(f"  --{flag.name}: {one_line(flag.help or '')}{default_text}")
    if command_line.takes_changes or command_line.CONFIG in flags.FLAGS:
        lines.append("Every field of a config, with its unit and reason, is in configs/base.py.")
    return "\n".join(lines)


def _quiet_logging() -> None:
    """Shows our logs from INFO on, all others from WARNING on, on standard error."""
    handler = output.LogHandler()
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("lightning_jax").setLevel(logging.INFO)
