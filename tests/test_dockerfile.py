"""The Dockerfile copies what there is and installs extras that there are."""

import ast
import re
from pathlib import Path

from tests.test_wheel import SOURCES

ROOT = Path(__file__).resolve().parent.parent
LINES = (ROOT / "Dockerfile").read_text().splitlines()


def instructions(name):
    return [line.split()[1:] for line in LINES if line.startswith(f"{name} ")]


def extras():
    setup = (ROOT / "setup.py").read_text()
    [found] = [
        keyword.value.keys
        for node in ast.walk(ast.parse(setup))
        for keyword in getattr(node, "keywords", ())
        if keyword.arg == "extras_require"
    ]
    return {ast.literal_eval(key) for key in found}


def test_what_it_copies_is_there_and_is_sent_to_docker():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        path
        for words in instructions("COPY")
        if not words[0].startswith("--from=")
        for path in words[:-1]
    }
    assert copied == sent and "*" in ignored
    assert all((ROOT / path).exists() for path in copied)


def test_a_wheel_is_built_from_what_it_copies():
    copied = {path for words in instructions("COPY") for path in words[:-1]}
    assert {*SOURCES} <= copied


def test_the_extras_that_it_installs_are_there():
    targets = {words[2]: words[0] for words in instructions("FROM")}
    assert targets["cuda"] == targets["cpu"] == "base" and [*targets][-1] == "cpu"
    lists = re.findall(r"\.whl\)\[([\w,-]+)\]", "\n".join(LINES))
    assert len(lists) == 2 and "cuda" in lists[0]
    assert {name for text in lists for name in text.split(",")} <= extras()


def test_no_program_runs_as_root():
    assert [words[0] for words in instructions("USER")] == ["1000", "1000"]
    assert '["lightning-jax"]' in [words[0] for words in instructions("ENTRYPOINT")]
