"""Every command of README and docs is known, and works on tiny substitutes."""

import re

import pytest

from benchmarks.report import SUITES
from configs import base
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build, to_dict
from tests.docs import shell, tiny
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, STARTERS, Block, blocks
from tests.programs import call_all

BLOCKS = blocks()
CALLS, UNKNOWN = shell.all_calls(BLOCKS)
PYTHON = [block for block in BLOCKS if block.language == "python"]
# Programs whose flags and config are read as they are written, and that are not run, by reason.
PARSED = {
    "experiments.benchmark": "measures for minutes; tests/benchmarks runs the suites",
    "experiments.aot_compile": "libtpu compiles for minutes; tests/aot compiles small ones",
    "experiments.lm_eval": "downloads the data of its tasks; tests/interop/lm_eval",
    "benchmarks.notebooks": "executes notebooks for minutes; tests/test_notebooks.py",
    "benchmarks.first_minutes": "clones, installs and trains; tests/benchmarks",
}
PROGRAMS = {f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("[a-z]*.py")}
RUN = PROGRAMS - {*PARSED}
TABLES = [call for call in CALLS if call.module == "benchmarks.scaling"]
# Flags of other programs that sentences speak of.
FOREIGN = {"user", "time"}
# Runs a program of PARSED up to its work: flags and config are read.
READ = """
import runpy, sys
from absl import flags
from lightning_jax.runtime import command_line, program

def read(main, *, commands=(), huge_pages=True):
    command_line.arguments(commands)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
        command_line.load_config(flags.FLAGS.config)

program.run = read
sys.argv = {words!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def unique(values):
    return list(dict.fromkeys(values))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("docs") / "home"
    home.mkdir()
    tiny.write_home(home)
    return home


@pytest.fixture(scope="module")
def lines(home):
    """By call or block: the command line that stands for it."""
    found = {}
    for call in CALLS:
        if call.module in RUN:
            found[call] = tuple(tiny.substitute(call, home))
        elif call.module in PARSED:
            words = [call.module, *call.flags]
            found[call] = ("-c", READ.format(words=words, module=call.module))
        elif call.module == "benchmarks.scaling":
            files = [file for flag in call.flags for file in shell.glob(flag)]
            found[call] = (call.module, *files)
    return found | {block: ("-c", tiny.python(block.text, home)) for block in PYTHON}


def test_every_block_says_what_it_is():
    assert len(PAGES) >= 6
    wrong = [block.where for block in BLOCKS if block.language not in LANGUAGES]
    assert not wrong, f"a language out of {LANGUAGES}, or text: {wrong}"
    # Indented blocks would be checked by nothing.
    for page in PAGES:
        for before, line in re.findall(r"^(.*)\n(    .*\S.*)$", page.read_text(), re.MULTILINE):
            assert before.strip() or not STARTERS.match(line.strip()), f"{page.name}: {line}"


def test_answers_hide_no_commands():
    for block in BLOCKS:
        if block.language == "text":
            hidden = [line for line in block.text.splitlines() if STARTERS.match(line)]
            assert not hidden, f"{block.where}: a command is in a block of its own: {hidden}"


def test_every_command_is_known():
    assert not UNKNOWN


def test_every_program_is_run_read_or_compared():
    assert CALLS and PYTHON
    known = {*RUN, *PARSED, "benchmarks.scaling"}
    unknown = [str(call) for call in CALLS if call.module not in known]
    assert not unknown, f"run it in tests/docs/test_commands.py: {unknown}"
    assert {call.module for call in CALLS} >= PROGRAMS, "a program that no page shows"


@pytest.mark.parametrize(
    "text",
    ["rm -rf runs", "python x.py", "make nothing", "pip install jax", "srun --what=3 python -m x"],
)
def test_an_unknown_command_is_refused(text):
    with pytest.raises(shell.Unknown):
        shell.calls(Block("page.md:1", "sh", text))


def test_what_other_machines_run_is_found():
    text = """
    srun --nodes=4 python -m experiments.train --workdir=/a  # a comment
    gcloud compute tpus tpu-vm ssh X --command="cd lightning_jax && X=1 .venv/bin/python -m a.b -c"
    """
    first, second = shell.calls(Block("page.md:1", "sh", text))
    assert (first.module, first.flags) == ("experiments.train", ("--workdir=/a",))
    assert (second.module, second.flags, second.environment) == ("a.b", ("-c",), ("X=1",))


# One test: of several workers of tests, one runs all commands.
@pytest.mark.slow
def test_all_commands_and_python_blocks_work(home, lines):
    prepared = [tuple(line) for line in tiny.prepare(home)]
    todo = unique([*prepared, *lines.values()])
    done = call_all(todo, timeout=1200, seconds=180, environment=tiny.QUICK)
    results = dict(zip(todo, done, strict=True))
    named = {line: line for line in prepared} | lines
    failed = [
        f"{what}\n{' '.join(line)}\n{results[line].stderr}"
        for what, line in named.items()
        if results[line].status != 0
    ]
    assert not failed, "\n\n".join(failed)
    for call in TABLES:
        page = (ROOT / call.where.partition(":")[0]).read_text()
        assert results[lines[call]].stdout.strip() in page, f"{call}: print the table again"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.where)
def test_benchmarks_have_a_suite(call):
    for flag in call.flags:
        if flag.startswith("--suite="):
            assert flag.removeprefix("--suite=") in SUITES, str(call)


def test_fields_that_sentences_name_are_there():
    named = re.compile(r"--config\.([a-z][\w.]*)")
    known = set(_paths(to_dict(build(RunConfig, base.get_config()))))
    for page in PAGES:
        for path in named.findall(page.read_text()):
            general = re.sub(r"^data\.sources\.\w+$", "data.sources", path)
            general = re.sub(r"^(stages|data\.sources)\.\w+\.", r"\1.*.", general.rstrip("."))
            general = re.sub(r"^(stages\.\*\.mixture)\.\w+$", r"\1", general)
            assert general in known, f"{page.name}: --config.{path}"


def test_flags_that_sentences_name_are_there():
    ours = shell.flags_of_programs()
    for page in PAGES:
        for code in re.findall(r"`(--[a-z][^`]*)`", page.read_text()):
            name = re.match(r"--([\w.]+)", code)[1]
            assert name in ours or name.startswith("config.") or name in FOREIGN, (page.name, code)


def test_a_fixed_p_is_fixed():
    for call in CALLS:
        sets_p = any(re.match(r"--config\S*\.top_p=", flag) for flag in call.flags)
        fixed = any("moe.target_experts=0" in flag for flag in call.flags)
        assert not sets_p or fixed, f"{call}: top_p alone is where the controller starts"


def _paths(values, at=""):
    for key, value in values.items():
        yield at + key
        if at in ("stages.", "data.sources."):
            yield from (
                path.replace(f"{at}{key}.", f"{at}*.", 1) for path in _paths(value, f"{at}{key}.")
            )
        elif isinstance(value, dict):
            yield from _paths(value, f"{at}{key}.")
