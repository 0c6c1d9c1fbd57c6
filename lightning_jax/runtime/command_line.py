"""The command line of a program: its flags, its config file and the overrides, and what is wrong.

Whatever is wrong with them is a `UserError`, one line: nothing of it is a fault of the program. A
config file is Python and is executed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, suggest
from lightning_jax.runtime import shipped

# The flags defined here belong to the program that asks for them.
flags.disclaim_key_flags()

logger = logging.getLogger(__name__)

CONFIG = "config"
_OVERRIDE = re.compile(rf"--?(?:no)?{CONFIG}\.([^=]*)")
# Flags whose value may be the empty text; an empty path would be the present folder.
_MAY_BE_EMPTY = ("prompt",)
default_config: str | None = None


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines `--config=FILE.py` and its overrides `--config.x.y=value`.

    Pass the flag's value to `load_config`.

    Args:
      default: the config file of a program that is called without `--config`.
    """
    global default_config
    # Not given to absl, which would read the file here, where nothing can report its errors. For
    # the same reason it must not see the command line yet, which may name files of flags.
    default_config, arguments, sys.argv = default, sys.argv, sys.argv[:1]
    try:
        return config_flags.DEFINE_config_file(
            CONFIG, None, "config file; any of its fields: --config.x.y=value", lock_config=True
        )
    finally:
        sys.argv = arguments


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
        raise UserError(f"--config: {one_line(error)}") from error


def names(flag: flags.FlagHolder) -> tuple[str, ...]:
    """Returns the names given to a list flag whose default is None; none if it was left out.

    Raises:
      UserError: the flag was given without names, or with one name twice.
    """
    found = tuple(flag.value or ())
    if flag.value is not None and not all(found or ("",)):
        raise UserError(
            f"--{flag.name}={','.join(found)}: a name is empty; leave the flag out for all"
        )
    if len(set(found)) < len(found):
        raise UserError(f"--{flag.name}={','.join(found)}: a name is given twice")
    return found


def numbers(flag: flags.FlagHolder) -> tuple[int, ...]:
    """Returns the whole numbers given to a list flag whose default is None.

    Raises:
      UserError: the flag was given without numbers.
    """
    found = flag.value or ()
    if flag.value is not None and not all(
        re.fullmatch(r"[0-9]{1,9}", text) for text in found or ("",)
    ):
        raise UserError(f"{flag.name} = {','.join(found)!r}: must be numbers like 0,1")
    return tuple(map(int, found))


def one_line(error: BaseException | str) -> str:
    """Returns the words of an exception, or a text, as one line."""
    # str(KeyError) is the repr of its message; config_flags even takes the repr of that.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = str(text).replace("\\n", " ").replace("\\'", "'")
    return " ".join(text.split()) or type(error).__name__


def arguments(commands: Sequence[str]) -> list[str]:
    """Parses sys.argv; returns the arguments of `main`: one of `commands`, if there are any.

    Raises:
      UserError: whatever a flag or the config file is refused for, or raises.
    """
    path = _config_first()
    try:
        with _without_warnings_of_absl():
            rest = flags.FLAGS(_with_file(path))[1:]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a config file may even call sys.exit(0)
        raise UserError(_flag_message(error, path)) from error
    _check_values(path)
    if not commands:
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
        return []
    if len(rest) != 1 or rest[0] not in commands:
        given = " ".join(rest)
        raise UserError(f"command {given!r}: must be {suggest(given, commands)}")
    return rest


@contextlib.contextmanager
def _without_warnings_of_absl() -> Iterator[None]:
    """config_flags warns of what becomes an error here."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)


def _check_values(config_file: str | None) -> None:
    """Raises UserError for a flag given twice, an empty one, and a config that is None.

    Overrides may follow one another, as in scripts that add to a list of them.
    """
    overrides = Counter(m[1] for m in map(_OVERRIDE.match, sys.argv[1:]) if m)
    for name, count in overrides.items():
        if count > 1:
            logger.warning("--%s.%s is given %d times: the last one counts", CONFIG, name, count)
    for module_flags in flags.FLAGS.flags_by_module_dict().values():
        for flag in module_flags:
            is_override = flag.name.startswith(f"{CONFIG}.")
            if is_override or isinstance(flag, flags.MultiFlag):
                continue
            if flag.present > 1:
                raise UserError(f"--{flag.name} is given {flag.present} times")
            if flag.present and flag.value == "" and flag.name not in _MAY_BE_EMPTY:
                raise UserError(f"--{flag.name} is empty")
    if config_file is not None and flags.FLAGS[CONFIG].value is None:
        raise UserError(f"{config_file}: get_config() = None: must be a mapping of fields")


def _config_first() -> str | None:
    """Moves `--config=FILE`, or the default, before its overrides; returns the path of the file.

    config_flags reports overrides before `--config`, and a missing file, badly.
    """
    if CONFIG not in flags.FLAGS:
        return None
    paths, rest, left = [], [], iter(sys.argv[1:])
    for argument in left:
        name, _, value = argument.partition("=")
        if name not in (f"-{CONFIG}", f"--{CONFIG}"):
            rest.append(argument)
        else:
            paths.append(value if "=" in argument else next(left, ""))
    if len(paths) > 1:
        raise UserError(f"--{CONFIG} is given {len(paths)} times")
    path = paths[0] if paths else default_config
    for name in [m[1] for m in map(_OVERRIDE.match, rest) if m]:
        if "" in name.split("."):
            raise UserError(f"--{CONFIG}.{name}: names no field; such as --{CONFIG}.seed=1")
    if path is None:
        if any(_OVERRIDE.match(argument) for argument in rest):
            load_config(None)
        return None
    file = shipped.find(path.split(":", 1)[0], shipped.CONFIGS, f"--{CONFIG}={path}")
    sys.argv[1:] = [f"--{CONFIG}={path}", *rest]
    return file


def _with_file(config_file: str | None) -> list[str]:
    """sys.argv as absl takes it; sys.argv itself, which is recorded, keeps the config's name."""
    if config_file is None:
        return sys.argv
    argument = "".join(sys.argv[1].partition(":")[1:])
    return [sys.argv[0], f"--{CONFIG}={config_file}{argument}", *sys.argv[2:]]


def _flag_message(error: BaseException, config_file: str | None) -> str:
    """Returns one line for any error of parsing flags or loading a config file."""
    chain: list[BaseException] = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    root = chain[-1]
    if isinstance(root, UserError):
        return one_line(root)
    if isinstance(root, SyntaxError) and root.filename != "<unknown>":
        return f"{root.filename or config_file}:{root.lineno or '?'}: {root.msg}"
    # An error inside the config file keeps its own words and line, not config_flags' traceback.
    own = os.path.abspath(config_file or "")
    for raised in reversed(chain):
        frames = traceback.extract_tb(raised.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == own]
        if lines:
            return f"{config_file}:{lines[-1]}: {type(raised).__name__}: {one_line(raised)}"
    # What config_flags says of the file as a whole, without its traceback.
    if isinstance(root, AttributeError) and "'get_config'" in str(root):
        return f"{config_file}: it has no function get_config()"
    if isinstance(root, TypeError) and str(root).startswith("get_config()"):
        return f"{sys.argv[1]}: {one_line(root)}"
    text = re.sub(
        r"\('Non-boolean argument to boolean flag', .*\)", "true or false?", one_line(error)
    )
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
