"""Command lines that are wrong: one line, status 2, nothing done, for every program."""

import ast
import importlib.util
import re

import pytest

from tests.programs import ROOT, call_all

PROGRAMS = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))
BASE = "--config=configs/base.py"
SWEEP = "--sweep=configs/sweeps/pattern.py"

# Files that a command line of the table names, as {home}/NAME.
FILES = {
    "exit_0.py": "import sys\ndef get_config():\n    sys.exit(0)\n",
    "exits.py": "import sys\nsys.exit()\n",
    "panic.py": "class Panic(BaseException): pass\ndef get_config():\n    raise Panic('no')\n",
    "empty.py": "",
    "none.py": "def get_config():\n    pass\n",
    "list.py": "def get_config():\n    return [1]\n",
    "null.py": "\0",
    "imports.py": "import nowhere\n",
    "reads.py": "def get_config():\n    return open('/nowhere/x')\n",
    "argument.py": "def get_config(path):\n    return path\n",
    "sweep_exits.py": "import sys\ndef get_sweep():\n    sys.exit(0)\n",
    "file": "",
    "flags": "--config.data.sources.poems=poems.txt\n--config.seed=3\n",
    "sweep_folder/sweep.json": "{}",
    "run/config.json": "{}",
}

# By program: flags, and a part of the line. {W} is --workdir=FOLDER, of a folder that is not there.
BAD = {
    "train": [
        ("", "--workdir is missing"),
        ("{W}", "--config is missing"),
        ("{W} --config=", "--config=: no such file: one of ablation, base, "),
        ("{W} --config=configs", "--config=configs: no such file"),
        ("{W} --config=README.md", "README.md:"),
        ("{W} --config=configs/smal.py", 'did you mean "configs/small.py"'),
        ("{W} --config=configs/base.py:zzz", "--config=configs/base.py:zzz: get_config() takes 0"),
        ("{W} --config={home}/argument.py", "get_config() missing 1 required"),
        ("{W} --config=configs/imported.py", "configs/imported.py needs a folder"),
        ("{W} --config=configs/imported.py:/nowhere", "/nowhere"),
        ("{W} --config={home}/exit_0.py", "exit_0.py:3: SystemExit: 0"),
        ("{W} --config={home}/exits.py", "exits.py:2: SystemExit"),
        ("{W} --config={home}/panic.py", "panic.py:3: Panic: no"),
        ("{W} --config={home}/empty.py", "empty.py: it has no function get_config()"),
        ("{W} --config={home}/none.py", "none.py: get_config() = None"),
        ("{W} --config={home}/list.py", "config = [1]: must be a mapping"),
        ("{W} --config={home}/list.py --config.data.sources.a=x", "config = [1]: must be a mapp"),
        ("{W} --config={home}/null.py", "null.py:?: source code"),
        ("{W} --config={home}/imports.py", "imports.py:1: ModuleNotFoundError"),
        ("{W} --config={home}/reads.py", "/nowhere/x"),
        ("{W} {B} --config=configs/small.py", "--config is given 2 times"),
        ("{W} {B} --workdir=other", "--workdir is given 2 times"),
        ("{W} {B} --profile --noprofile", "--profile is given 2 times"),
        ("{W} {B} --config.seed=", "flag --config.seed="),
        ("{W} {B} --config.seed=1.5", "flag --config.seed=1.5"),
        ("{W} {B} --config.seed=nan", "flag --config.seed=nan"),
        ("{W} {B} --config.seed", "Missing value for flag --config.seed"),
        ("{W} {B} --config.model=3", "flag --config.model=3"),
        ("{W} {B} --config.stages=None", "flag --config.stages=None"),
        ("{W} {B} --config.stages.nope.tokens=3", "unknown config field stages.nope.tokens"),
        ("{W} {B} --config.modle.unit=G", "unknown config field modle.unit"),
        (
            "{W} {B} --config.learning_rate=1",
            "--config.stages.stable.learning_rate or --config.stages.decay.learning_rate?",
        ),
        ("{W} {B} --config.num_experts=1", "did you mean --config.model.moe.num_experts?"),
        ("{W} {B} --config.model.num_layers=4", "the depth is the letters of --config.model.unit"),
        ("{W} {B} --config.mixture.code=1", "did you mean --config.stages.stable.mixture.code or"),
        ("{W} {B} --config.data.sources.poems.weight=1", "needs --config.data.sources.poems.path"),
        ("{W} {B} --config.data.sources.dosc=None", 'no such source (did you mean "docs"?)'),
        ("{W} {B} --config.data.sources.a", "must be written --config.data.sources.a=VALUE"),
        ("{W} {B} --config.stages.stable.mixture.poems=1", "stages.stable.mixture = 'poems'"),
        ("{W} {B} --config.stages.stable.mixture.code=x", "mixture.code = 'x': must be of type fl"),
        ("{W} {B} --config.=3", "--config.: names no field"),
        ("{W} {B} --config.model..unit=G", "--config.model..unit: names no field"),
        ("{W} {B} --config.model.scan=maybe", "true or false?"),
        ("{W} {B} --config.optimizer.weight_decay=x", "flag --config.optimizer.weight_decay=x"),
        ("--workdir= {B}", "--workdir is empty"),
        ("{B} --workdir", "Missing value for flag --workdir"),
        ("{W} {B} --profil", "Did you mean: profile"),
        ("{W} {B} --profile=maybe", "flag --profile=maybe: true or false?"),
        ("{W} {B} --noworkdir", "Unknown command line flag 'noworkdir'"),
        ("{W} {B} -", "unexpected argument '-'"),
        ("{W} {B} -- x", "unexpected argument 'x'"),
        ("{W} {B} --flagfile=/nowhere", "Unable to open flagfile"),
        ("{W} --config=configs/own_text.py", "configs/own_text.py needs a text"),
        ("{W} --config=configs/own_text.py:/nowhere", "PATH = '/nowhere': must be a path or a"),
        ("{W} --config=configs/own_text.py:{home}/sweep_folder", "must be a folder with files of"),
        ("{W} --config=configs/own_text.py:docs,tokens=x", "tokens = x: must be a number like 5e6"),
        ("{W} --config=configs/own_text.py:docs,docs", "docs,docs: a path, or tokens, is given tw"),
        ("{B} --workdir={home}/file", "workdir = "),
        ("{B} --workdir={home}/file/run", "workdir = "),
        ("{B} --workdir={home}/{long}", "workdir = "),
    ],
    "quickstart": [
        ("--config=nope.py", "--config=nope.py: no such file"),
        ("--workdir={home}/file", "workdir = "),
        ("extra", "unexpected argument 'extra'"),
    ],
    "evaluate": [
        ("", "--workdir is missing"),
        ("--workdir=", "--workdir is empty"),
        ("{W}", "no checkpoint"),
        ("--workdir={home}/file", "no checkpoint"),
        ("{W} --step=x", "flag --step=x"),
        ("{W} --eval.routing=top", "flag --eval.routing=top: value should be one of"),
        ("{W} --eval.top_k=1.5", "flag --eval.top_k=1.5"),
        ("{W} --eval.tokens=3", "Unknown command line flag 'eval.tokens'. Did you mean"),
        ("{W} --data=", "--data is empty"),
        ("{W} --out=/nowhere/x.json", "out = '/nowhere/x.json': there is no folder"),
    ],
    "generate": [
        ("{W}", "--prompt is missing"),
        ("--prompt=x", "--workdir is missing"),
        ("{W} --prompt=x", "no checkpoint"),
        ("{W} --prompt x y", "unexpected argument 'y'"),
        ("{W} --prompt=x --temperature=-1", "temperature = -1.0"),
        ("{W} --prompt=x --temperature=nan", "temperature = nan"),
        ("{W} --prompt=x --temperature=hot", "flag --temperature=hot"),
        ("{W} --prompt=x --top_p=2", "top_p = 2.0"),
        ("{W} --prompt=x --top_k=-1", "top_k = -1"),
        ("{W} --prompt=x --max_new_tokens=0", "max_new_tokens = 0"),
        ("{W} --prompt=x --num_samples=0", "num_samples = 0"),
        ("{W} --prompt=x --seed=-1", "seed = -1"),
        ("{W} --prompt=x --seed=99999999999999999999999", "seed = 9999"),
        ("{W} --prompt=x --eval.top_p=0", "eval.top_p = 0.0"),
        ("{W} --prompt=x --eval.top_k=0", "eval.top_k = 0"),
        ("{W} --prompt=x --eval.routing=top", "flag --eval.routing=top: value should be one of"),
        ("{W} --prompt=x --routing_top_p=0.5", "Unknown command line flag 'routing_top_p'"),
        ("{W} --prompt=x --chat=perhaps", "flag --chat=perhaps"),
    ],
    "convert": [
        ("{W}", "--path is missing"),
        ("{W} --path=docs", "give one of --from=hf and --to=hf"),
        ("{W} --path=docs --from=hf --to=hf", "give one of --from=hf and --to=hf"),
        ("{W} --path=docs --from=hff", "flag --from=hff"),
        ("{W} --path=/nowhere --from=hf", "/nowhere"),
        ("{W} --path={home}/file --from=hf", "file"),
        ("{W} --path=docs --from=hf", "docs/config.json"),
        ("--workdir={home}/file --path=docs --from=hf", "file' is not a folder"),
        ("{W} --path=docs --from=hf --kv_source=a,b", "kv_source = 'a,b'"),
        ("{W} --path=docs --from=hf --kv_source=", "kv_source = ''"),
        ("{W} --path={home}/out --to=hf", "{home}/none"),
        ("{W} --path={home}/file --to=hf", "path = "),
        ("{W} --path={home}/out --to=hf --dtype=float16", "flag --dtype=float16"),
    ],
    "upcycle": [
        ("{W} {B}", "--source is missing"),
        ("{W} --source=docs", "--config is missing"),
        ("{W} {B} --source=/nowhere", "/nowhere"),
        ("{W} {B} --source=docs", "docs"),
        ("--workdir={home}/file {B} --source=docs", "file' is not a folder"),
        ("{W} {B} --source=docs --pool=last", "flag --pool=last"),
    ],
    "lm_eval": [
        ("{W}", "--tasks is missing"),
        ("{W} --tasks=", "--tasks=: a name is empty"),
        ("{W} --tasks=a,a", "a name is given twice"),
        ("{W} --tasks=a --limit=x", "flag --limit=x"),
        ("{W} --tasks=a --eval.top_p=2", "eval.top_p = 2.0"),
        ("{W} --tasks=a --out=docs", "out = 'docs': is a folder"),
    ],
    "sweep": [
        ("{W}", "--sweep is missing"),
        ("{W} --sweep=x", "sweep = 'x': no such file: one of balance, "),
        ("{W} --sweep=configs/sweeps", "no such file"),
        ("{W} --sweep=configs/base.py", "it has no function get_sweep()"),
        ("{W} --sweep={home}/sweep_exits.py", "sweep_exits.py:3: SystemExit: 0"),
        ("{W} --sweep={home}/null.py", "null.py"),
        ("{W} {S} --only=zzz", "only = 'zzz': must be one of G, LG_w16, "),
        ("{W} {S} --only=", "--only=: a name is empty"),
        ("{W} {S} --only=G,G", "--only=G,G: a name is given twice"),
        ("{W} {S} --seeds=9", "seeds = 9: must be one of 0, 1, 2"),
        ("{W} {S} --seeds=a", "seeds = 'a': must be numbers like 0,1"),
        ("{W} {S} --seeds=", "seeds = ''"),
        ("{W} {S} --set=model.unit=G", "Unknown command line flag 'set'"),
        ("{W} {S} --config=configs/base.py", "Unknown command line flag 'config'"),
        ("{W} {S} --config.model.unit", "must be written --config.model.unit=VALUE"),
        ("{W} {S} --config.=1", "--config.: names no field"),
        ("{W} {S} --config.model.nope=1", "unknown config field model.nope"),
        ("{W} {S} --config.lr=1", "did you mean --config.stages.stable.learning_rate or"),
        ("{W} {S} --config.seed=1", "seed cannot be changed here"),
        ("{W} {S} --config.model.model_dim=x", "model.model_dim = 'x'"),
        ("{W} {S} --config.data.sources.dosc=None", "there is no such source"),
        ("{S} --workdir={home}/file", "file' is not a folder"),
        ("{S} --workdir={home}/run", "is a run's folder"),
        ("{S} --workdir={home}/run --task=0", "is a run's folder"),
        ("{W} {S} --jobs=0", "jobs = 0: must be 1 or more"),
        ("{W} {S} --prepare --jobs=0", "jobs = 0: must be 1 or more"),
        ("{W} {S} --jobs=x", "flag --jobs=x"),
        ("{W} {S} --task=999", "task = 999: must be the number of a run, from 0 to "),
        ("{W} {S} --task=-1", "task = -1: must be the number of a run, from 0 to "),
        ("{W} {S} --task=0 --only=G", "only = ('G',): must be left out with --task"),
        ("{W} {S} --task=0 --jobs=2", "jobs = 2: must be left out with --task"),
        ("{W} {S} --plan --only=G", "only = ('G',): must be left out with --plan"),
        ("{W} {S} --prepare --seeds=0", "seeds = (0,): must be left out with --prepare"),
        ("{W} {S} --submit=local --jobs=2", "jobs = 2: must be left out with --submit"),
        ("{W} {S} --task=0 --plan", "At most one of (plan, prepare, task, submit)"),
        ("{W} {S} --submit=sge --executor=timeout_min=9", "submit = 'sge': must be one of slurm"),
        ("{W} {S} --submit=local", "executor = {{}}: must be with timeout_min"),
        ("{W} {S} --submit=local --executor=cpus", "executor = 'cpus': must be written name=value"),
        ("{W} {S} --executor=timeout_min=9", "must be given with --submit"),
    ],
    "report": [
        ("", "--workdir is missing"),
        ("{W}", "must be a folder that experiments.sweep made"),
        ("--workdir={home}/file", "file' is not a folder"),
        ("--workdir=docs", "must be a folder that experiments.sweep made"),
        ("--workdir={home}/sweep_folder", "sweep field question is missing"),
    ],
    "compare": [
        ("", "arguments '': must be FOLDER FOLDER"),
        ("docs", "arguments 'docs': must be FOLDER FOLDER"),
        ("docs {home}/none", "'docs': must be the folder of a run"),
        ("docs docs", "'docs': is given twice"),
        ("{home}/run docs", "run/config.json"),
        ("{home}/run docs --page=x.htm", "page = 'x.htm': must be a name that ends in .html"),
        ("{home}/run docs --page=/nowhere/x.html", "there is no folder '/nowhere'"),
        ("{home}/run docs --out=docs", "out = 'docs': is a folder"),
    ],
    "benchmark": [
        ("", "--suite is missing"),
        ("--suite=atention", 'did you mean "attention"'),
        ("--suite=data --only=zzz", "no row of the suite data has that in its name, one of start_"),
        ("--suite=data --only=", "--only=: a name is empty"),
        *(
            (f"--suite={name} --only=zzz", "only = 'zzz': no row of")
            for name in ("startup", "attention", "moe", "train", "serve_small")
        ),
        ("--suite=data --rounds=0", "flag --rounds=0"),
        ("--suite=data --profile", "--profile is for the suites"),
        ("--suite=data --out=/nowhere/x.json", "out = '/nowhere/x.json': there is no folder"),
        ("--suite=data --out=docs", "out = 'docs': is a folder"),
        ("--suite=data --out=", "--out is empty"),
        ("--suite=data --out={home}/file/x.json", "there is no folder"),
        ("--suite=data --out={home}/{long}", "File name too long"),
        ("--suite=data --config=nope.py", "--config=nope.py: no such file"),
    ],
    "aot_compile": [
        ("{B}", "--topology is missing"),
        ("--topology=v5e:2x2", "--config is missing"),
        ("{B} --topology=v9:2x2", "the chip must be one of v4, v5e, v5p, v6e"),
        ("{B} --topology=v5e:16x32", "topology = 'v5e:16x32': must be v5e:16x16 or smaller"),
        ("{B} --topology=v5e:2x2 --slices=0", "slices = 0"),
        ("{B} --topology=v5e:2x2 --programs=trian", "programs = 'trian': must be one of"),
        ("{B} --topology=v5e:2x2 --programs=", "--programs=: a name is empty"),
        ("{B} --topology=v5e:2x2 --stage=decoy", "stage = 'decoy': must be one of stable, decay"),
        ("{B} --topology=v5e:2x2 --rows=0", "rows = 0"),
        ("{B} --topology=v5e:2x2 --length=0", "length = 0"),
        ("{B} --topology=v5e:2x2 --prefill_chunk=0", "prefill_chunk = 0"),
        ("{B} --topology=v5e:2x2 --search --remats=ful", "remats = 'ful'"),
        ("{B} --topology=v5e:2x2 --search --accumulates=x", "accumulates = 'x'"),
        ("{B} --topology=v5e:2x2 --search --max_compiles=0", "max_compiles = 0"),
        ("{B} --topology=v5e:2x2 --out=/nowhere/x.json", "there is no folder '/nowhere'"),
    ],
    "train_tokenizer": [
        ("--data=README.md", "--out is missing"),
        ("--data=/nowhere/*.txt --out={home}/t.json", "/nowhere/*.txt"),
        ("--data= --out={home}/t.json", "--data is empty"),
        ("--data=README.md --out=/nowhere/t.json", "there is no folder '/nowhere'"),
        ("--data=README.md --out=docs", "out = 'docs': is a folder"),
        ("--data=README.md --out={home}/t.json --vocab_size=3", "vocab_size = 3"),
    ],
}
# Lines before that of the error, of programs that go on: what is not as it seems.
SAID = [
    (
        "train",
        "--config.data.sources.poems.path=poems.txt --config.stages.decay.mixture.docs=None",
        "mixture  stable: code 45.0%, docs 5.0%, poems 50.0%; decay: code 47.4%, poems 52.6%",
    ),
    (
        "train",
        "--config.data.sources.docs=None",
        "mixture  stable: code 100.0%; decay: code 100",
    ),
    ("train", "--config.data.sources.docs=None --flagfile={home}/flags", "mixture  stable: code "),
    (
        "train",
        "--config.model.moe.top_p=0.5",
        "--config.model.moe.top_p=0.5 is only where the controller starts, which holds 3 experts "
        "per token; a fixed top_p needs --config.model.moe.target_experts=0 too",
    ),
    ("train", "--config.model.moe.top_p=0.5 --config.model.moe.target_experts=0", ""),
    ("train", "--config.seed=1 --config.seed=2", "--config.seed is given 2 times: the last one"),
]
CASES = [(program, *case) for program, cases in BAD.items() for case in cases]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="module")
def words(home):
    return dict(home=home, W=f"--workdir={home}/none", B=BASE, S=SWEEP, long="x" * 300)


@pytest.fixture(scope="module")
def results(words, home):
    lines = [
        [program, *(flag.format(**words) for flag in flags.split())] for program, flags, _ in CASES
    ]
    lines += [
        [program, BASE, f"--workdir={home}/file", *flags.format(**words).split()]
        for program, flags, _ in SAID
    ]
    helps = [[program, flag] for program in PROGRAMS for flag in ("--help", "-h")]
    return call_all(lines + helps)


@pytest.mark.slow
def test_a_refused_command_leaves_no_trace(results, home):
    found = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert found == {*FILES} and not (home / "none").exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_program_imports_when_it_runs_is_there(program):
    tree = ast.parse((ROOT / "experiments" / f"{program}.py").read_text())
    for node in ast.walk(tree):
        for name in node.names if isinstance(node, ast.ImportFrom) else ():
            assert _exists(node.module, name.name), f"from {node.module} import {name.name}"


def _exists(module, name):
    try:
        if importlib.util.find_spec(f"{module}.{name}"):
            return True
    except ModuleNotFoundError:  # `module` is no package
        pass
    return hasattr(importlib.import_module(module), name)


def test_every_program_is_in_the_table():
    assert sorted(BAD) == PROGRAMS


# Case F5, case F2 (outputs)
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(CASES[n][:2]))
def test_a_wrong_command_line_is_one_line(results, words, number):
    result, part = results[number], CASES[number][2].format(**words)
    assert result.status == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert part in result.stderr and result.stdout == ""


@pytest.mark.parametrize("number", range(len(SAID)), ids=lambda n: SAID[n][1])
def test_what_is_not_as_it_seems_is_said(results, number):
    result, line = results[len(CASES) + number], SAID[number][2]
    *said, error = result.stderr.splitlines()
    assert result.status == 2 and error.startswith("error: workdir = "), result.stderr
    assert said[0].startswith(line) if line else not said


@pytest.mark.parametrize("number", range(2 * len(PROGRAMS)))
def test_help_says_what_a_program_does_with_an_example(results, number):
    result, program = results[len(CASES) + len(SAID) + number], PROGRAMS[number // 2]
    assert (result.status, result.stderr) == (0, "")
    about, flags = result.stdout.split("\nFlags:\n")
    assert re.search(rf"^    python -m experiments\.{program}\b", about, re.MULTILINE)
    # Each flag of the program, and none of the libraries', with what it means.
    for line in flags.splitlines():
        assert re.match(r"  --[\w.]+: \S.*", line) or line.startswith("Every field of a config"), (
            line
        )
    # The flags of its examples exist.
    examples = re.findall(rf"experiments\.{program} (.*(?:\n        .*)*)", about)
    for name in re.findall(r"--([a-z_.]+)", " ".join(examples)):
        assert f"--{name}:" in flags or name.startswith("config."), name
