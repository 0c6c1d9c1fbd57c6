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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from lightning_jax.config import RunConfig, overrides
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, suggest
from lightning_jax.config.model import ROUTINGS
from lightning_jax.config.routing import EvalRouting
from lightning_jax.runtime import shipped

# The flags defined here belong to the program that asks for them.
flags.disclaim_key_flags()

logger = logging.getLogger(__name__)

CONFIG = "config"
_OVERRIDE = re.compile(rf"--?(no)?{CONFIG}\.([^=]*)")
# Flags whose value may be the empty text; an empty path would be the present folder.
_MAY_BE_EMPTY = ("prompt",)

default_config: str | None = None
takes_changes = False
# Of the command line: the arguments that absl and config_flags see, the dotted names of all
# overrides, and the values of those that are no flags.
_seen: list[str] = []
_overridden: list[str] = []
_changes: dict[str, Any] = {}


class _FileParser(ConfigFileFlagParser):
    """Reads a config file; refuses an override of an unknown field with those that are meant."""

    def parse(self, path: str) -> Any:
        config = super().parse(path)
        if isinstance(config, ConfigDict):
            for field in _overridden:
                if field not in _changes:
                    overrides.require_field(overrides.plain(config), field, f"--{CONFIG}.")
        return config


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines `--config=FILE.py` and its overrides `--config.x.y=value`.

    Pass the flag's value to `load_config`.

    Args:
      default: the config file of a program that is called without `--config`.
    """
    global default_config
    # Not given to absl, which would read the file here, where nothing can report its errors. For
    # the same reason config_flags sees no command line yet.
    default_config = default
    about = (
        "Config file. --config.x.y=value changes any of its fields; "
        "--config.data.sources.NAME=PATH adds a text, and None in place of PATH removes one."
    )
    holder = config_flags.DEFINE_config_file(CONFIG, None, about, sys_argv=_seen)
    flags.FLAGS[CONFIG].parser = _FileParser(CONFIG)
    return holder


def define_changes() -> Callable[[], dict[str, Any]]:
    """Defines `--config.x.y=value` for a program without `--config`.

    Returns what gives them, by dotted field, once the flags are parsed: Python literals, or text.
    """
    global takes_changes
    takes_changes = True
    return lambda: dict(_changes)


def define_step() -> flags.FlagHolder:
    """Defines `--step`, of a program that reads a run."""
    return flags.DEFINE_integer("step", None, "Checkpoint; default: the newest.")


def define_out() -> flags.FlagHolder:
    """Defines `--out`, of a program that answers with JSON; see `program.check_out`."""
    return flags.DEFINE_string("out", None, "File for the JSON, besides standard output.")


def define_routing() -> Callable[[], EvalRouting]:
    """Defines `--eval.routing`, `--eval.top_k` and `--eval.top_p`, of programs that run a model.

    Returns what gives their EvalRouting once the flags are parsed.
    """
    routing = flags.DEFINE_enum(
        "eval.routing", None, ROUTINGS, "How tokens choose experts; default: as in the run."
    )
    top_k = flags.DEFINE_integer("eval.top_k", None, "Experts per token under top_k.")
    top_p = flags.DEFINE_float(
        "eval.top_p", None, "Probability that the experts of a token reach under top_p."
    )
    return lambda: EvalRouting(routing.value, top_k.value, top_p.value)


def load_config(values: Any) -> RunConfig:
    """Builds the RunConfig from the value of the flag that `define_config` made.

    Raises:
      UserError: no config was given, it cannot be read, or `fields.build` refuses it.
    """
    if values is None:
        raise UserError("--config is missing: a file such as configs/quickstart.py")
    try:
        values = overrides.plain(values)
        if _changes and isinstance(values, dict):
            values = overrides.override(values, _changes, prefix=f"--{CONFIG}.")
        config = build(RunConfig, values)
    except OSError as error:
        raise UserError(f"--config: {one_line(error)}") from error
    if note := overrides.misleading(config.model.moe, _overridden, prefix=f"--{CONFIG}."):
        logger.warning("%s", note)
    if _changes:
        logger.info("mixture  %s", _shares(config))
    return config


def _shares(config: RunConfig) -> str:
    """The share of each source in the tokens of each stage, as one line."""
    lines = []
    for stage in config.stages:
        shares = [f"{name} {part:.1%}" for name, part in config.data.shares(stage).items()]
        lines.append(f"{stage.name}: {', '.join(shares)}")
    return "; ".join(lines)


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


def arguments(commands: Sequence[str], operands: Sequence[str] = ()) -> list[str]:
    """Parses sys.argv; returns the arguments of `main`: one of `commands`, or all `operands`.

    Raises:
      UserError: whatever a flag or the config file is refused for, or raises.
    """
    path = _read_command_line()
    try:
        with _without_warnings_of_absl():
            rest = flags.FLAGS(_seen)[1:]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a config file may even call sys.exit(0)
        raise UserError(_flag_message(error, path)) from error
    _check_values(path)
    if operands:
        if len(rest) != len(operands) or not all(rest):
            raise UserError(f"arguments {' '.join(rest)!r}: must be {' '.join(operands)}")
        return rest
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
    """Raises UserError for a flag given twice, an empty one, and a config that is None."""
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


def _read_command_line() -> str | None:
    """Takes the overrides that are no flags out of what absl sees; returns the config file's path.

    What is left starts with `--config=FILE`, or the default: config_flags reports overrides before
    it, and a missing file, badly. Overrides may follow one another, as in scripts that add to a
    list of them.
    """
    try:
        given = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
    except flags.Error as error:
        raise UserError(one_line(error)) from error
    paths, rest, left = [], [], iter(given)
    for argument in left:
        name, equals, value = argument.partition("=")
        if CONFIG in flags.FLAGS and name in (f"-{CONFIG}", f"--{CONFIG}"):
            paths.append(value if equals else next(left, ""))
        elif not _takes(argument):
            rest.append(argument)
    for name, count in Counter(_overridden).items():
        if count > 1:
            logger.warning("--%s.%s is given %d times: the last one counts", CONFIG, name, count)
    if len(paths) > 1:
        raise UserError(f"--{CONFIG} is given {len(paths)} times")
    path = paths[0] if paths else default_config
    _seen[:] = [sys.argv[0], *rest]
    if path is None:
        if CONFIG in flags.FLAGS and _overridden:
            load_config(None)
        return None
    file, colon, argument = path.partition(":")
    file = shipped.find(file, shipped.CONFIGS, f"--{CONFIG}={path}")
    _seen[1:1] = [f"--{CONFIG}={file}{colon}{argument}"]
    return file


def _takes(argument: str) -> bool:
    """Notes an override; whether it is one that absl must not see, whose value is kept."""
    found = _OVERRIDE.match(argument)
    if not found or not (takes_changes or CONFIG in flags.FLAGS):
        return False
    is_no, field = found.groups()
    if "" in field.split("."):
        raise UserError(f"--{CONFIG}.{field}: names no field; such as --{CONFIG}.seed=1")
    _overridden.append(field)
    if not (takes_changes or overrides.may_add(field)):
        return False
    _, equals, value = argument.partition("=")
    if not is_no and not equals:
        raise UserError(f"--{CONFIG}.{field}: must be written --{CONFIG}.{field}=VALUE")
    _changes[field] = False if is_no else overrides.parse(value)
    return True


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
        return f"{_seen[1]}: {one_line(root)}"
    text = re.sub(
        r"\('Non-boolean argument to boolean flag', .*\)", "true or false?", one_line(error)
    )
    if missing := re.match(r"flag --(\w+)=None: Flag --\w+ must have a value", text):
        return f"--{missing[1]} is missing"
    return text
