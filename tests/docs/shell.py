"""Command lines of the pages, and the Python programs inside of them.

What is not known here is an error, so that nothing gets into the pages that is not checked.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from tests.docs.blocks import ROOT, Block

_SETUP = (ROOT / "setup.py").read_text()
EXTRAS = set(re.findall(r'^        "([\w-]+)": ', _SETUP, re.MULTILINE))
[REPOSITORY] = re.findall(r'url="([^"]+)"', _SETUP)
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
# What starts a program on other machines, with the options that may stand before it.
_LAUNCHERS = {
    "srun": r"--(nodes|ntasks-per-node|gpus-per-node|cpus-per-task)=\d+",
    "mpirun": r"-n|\d+|--map-by|ppr:\d+:node",
}
_IMAGE = r"run --rm (--gpus=all )?-v \$PWD:/work lightning-jax(:cuda)? "
# Commands that run nothing of ours, and what their arguments look like.
_OTHERS = {
    "cd": r"lightning_jax",
    "source": r"\.venv/bin/activate",
    "tensorboard": r"--logdir=runs(/\w+)?",
    "sbatch": r"\w+\.sbatch",
    "kubectl": r"apply -f \w+\.yaml",
    "git": rf"clone {re.escape(REPOSITORY)}",
    "docker": r"stop|build -t lightning-jax(:cuda --target cuda)? \.",
    "benchmarks/gpu.sh": r"",
    "pre-commit": r"install",
    "test": r"\$\? = \d+",
    "scontrol": r"requeue \$SLURM_JOB_ID",
}


class Unknown(AssertionError):
    """A page shows something that this file does not know."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A Python program as a page calls it."""

    where: str
    module: str
    flags: tuple[str, ...]
    environment: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join([*self.environment, self.module, *self.flags])}"


def calls(block: Block) -> list[Call]:
    """The Python programs that a block of commands, or a file, runs.

    Raises:
      Unknown: a command that is not known.
    """
    if block.language == "yaml":
        commands = [words for text in yaml.safe_load_all(block.text) for words in _commands(text)]
        return [call for words in commands for call in _simple(words, block.where)]
    return [call for words in split(block.text) for call in _simple(words, block.where)]


def all_calls(blocks: Sequence[Block]) -> tuple[list[Call], list[str]]:
    """The Python programs of all blocks, and what is not known of them."""
    found: list[Call] = []
    unknown: list[str] = []
    for block in blocks:
        try:
            found += calls(block) if block.language in ("sh", "yaml") else []
        except Unknown as error:
            unknown.append(str(error))
    return found, unknown


def split(text: str) -> Iterator[list[str]]:
    """The simple commands of a script."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in lexer:
            if word in ("&&", "||", ";", "|", "&"):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def _commands(value: Any) -> Iterator[Sequence[str]]:
    """The `command` lists of a file for Kubernetes."""
    if isinstance(value, Mapping):
        if "command" in value:
            yield value["command"]
        for inner in value.values():
            yield from _commands(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _commands(inner)


def _simple(words: Sequence[str], where: str) -> list[Call]:
    environment = []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        environment.append(words[0])
        words = words[1:]
    if not words:
        return []
    name, rest = words[0].removeprefix(".venv/bin/"), list(words[1:])
    if name == "python":
        return _python(rest, where, tuple(environment))
    if name == "make":
        return _make(rest, where)
    if name == "pip":
        _pip(rest, where)
        return []
    if name == "gcloud":
        [command] = [word.removeprefix("--command=") for word in rest if "--command=" in word]
        return [call for inner in split(command) for call in _simple(inner, where)]
    if name in _LAUNCHERS and "python" in rest:
        before = rest[: rest.index("python")]
        if unknown := [word for word in before if not re.fullmatch(_LAUNCHERS[name], word)]:
            raise Unknown(f"{where}: options of {name}: {unknown}")
        return _simple(rest[rest.index("python") :], where)
    if name == "lightning-jax":
        return [Call(where, f"experiments.{rest[0]}", tuple(rest[1:]), tuple(environment))]
    if found := name == "docker" and re.match(_IMAGE, " ".join(rest)):
        return _simple(["lightning-jax", *" ".join(rest)[found.end() :].split()], where)
    if name in _OTHERS and re.fullmatch(_OTHERS[name], " ".join(rest)):
        return []
    raise Unknown(f"{where}: {shlex.join(words)}: say in tests/docs/shell.py what this is")


def _python(words: list[str], where: str, environment: tuple[str, ...]) -> list[Call]:
    if words[:2] == ["-m", "pytest"]:
        paths = [word for word in words if "/" in word]
        if missing := [path for path in paths if not (ROOT / path).exists()]:
            raise Unknown(f"{where}: no such tests: {missing}")
        return []
    if words[:1] != ["-m"] or len(words) < 2:
        raise Unknown(f"{where}: python {' '.join(words)}: only python -m MODULE is known")
    return [Call(where, words[1], tuple(words[2:]), environment)]


def _make(words: list[str], where: str) -> list[Call]:
    targets = [word for word in words if "=" not in word]
    if unknown := set(targets) - TARGETS:
        raise Unknown(f"{where}: make {' '.join(unknown)}: one of {sorted(TARGETS)}")
    quickstart = Call(where, "experiments.quickstart", ("--workdir=runs/quickstart",))
    return [quickstart] * ("quickstart" in targets)


def _pip(words: list[str], where: str) -> None:
    if words == ["wheel", "--no-deps", "-w", "dist", "."]:
        return
    found = re.fullmatch(
        r"install (?:-c constraints\.txt )?-e (\.|\.\[([\w,-]+)\])", " ".join(words)
    )
    if not found:
        raise Unknown(f"{where}: pip {' '.join(words)}: only pip install -e '.[EXTRAS]' is known")
    if unknown := set(filter(None, (found[2] or "").split(","))) - EXTRAS:
        raise Unknown(f"{where}: extras {sorted(unknown)}: one of {sorted(EXTRAS)}")


def glob(argument: str) -> list[str]:
    """What a shell makes of an argument: the files of a pattern, or the argument."""
    found = ROOT.glob(argument) if "*" in argument else ()
    return sorted(str(path.relative_to(ROOT)) for path in found) or [argument]


def flags_of_programs() -> set[str]:
    """Names of the flags that programs define, by themselves or by `runtime.command_line`."""
    names = {"config"}
    shared = ROOT / "lightning_jax" / "runtime" / "command_line.py"
    for path in (shared, *(ROOT / "experiments").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr.startswith("DEFINE_"):
                names |= {word.value for word in node.args[:1] if isinstance(word, ast.Constant)}
    return names
