"""Tiny substitutes for what the commands and the Python of the pages name.

A command runs with its own flags and its own config, whose model, stages and text are shrunk.
Programs that read a run read one that all share; those that make a folder make a new one.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import base
from tests.docs.blocks import ROOT
from tests.docs.shell import Call
from tests.tiny import tiny_config, write_corpus

# The compiler of the tests (conftest.py), on one device.
QUICK = {
    "XLA_FLAGS": re.sub(r"\S*device_count=\S*", "", os.environ.get("XLA_FLAGS", "")).strip(),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py"))
SWEEPS = sorted(path.stem for path in (ROOT / "configs" / "sweeps").glob("[a-z]*.py"))
# Read a run's folder, or that of a sweep; all other programs make one.
_READERS = {"evaluate": "run", "generate": "run", "report": "sweep"}
# What a program takes if it is not told, and what it must have.
_DEFAULTS = {"quickstart": ("--config=configs/quickstart.py", "--config.sample_tokens=4")}
# Of programs on several processes, and what the shared tokenizer has no template for.
_LEFT_OUT = {"distributed", "coordinator_address", "num_processes", "process_id", "chat"}
_SMALL = {
    "max_new_tokens": "4",
    "num_samples": "1",
    "prompt": "def ",
    "eval_tokens": "64",
    "step": "2",
    "vocab_size": "300",
    "seeds": "0",
    "jobs": "2",
    "task": "0",
}
# Of sweeps: flags that do not change what is in its folder at the end.
_HOW = {"sweep", "workdir", "jobs", "plan", "prepare", "task"}
# Sizes of a config that a command may ask for.
_SIZES = (
    (r"stages\.\w+\.tokens", "256"),
    (r"stages\.\w+\.(warmup|decay)_tokens", "128"),
    (r"stages\.\w+\.seq_len", "16"),
    (r"stages\.\w+\.batch_size", "8"),
    (r"model\.model_dim", "32"),
    (r"model\.num_units", "1"),
    (r"model\.mlp_dim", "64"),
    (r"model\.moe\.expert_dim", "16"),
    (r"model\.vocab_size", "0"),
    (r"data\.tokenizer", "bytes"),
)


def shrink(config: Any, corpus: str, *, model: bool = True) -> Any:
    """A config with the same stages and sources, few tokens of `corpus` and a tiny model."""
    dense = config.model.moe.num_experts == 0
    with config.unlocked():
        if model:
            config.model = tiny_config().model
            config.model.mlp_dim = 64
            if dense:
                config.model.moe.num_experts = config.model.moe.target_experts = 0
        config.data.tokenizer = "bytes" if model else config.data.tokenizer
        for source in config.data.sources.values():
            if not source.path.startswith(str(Path(corpus).parent)):
                source.path, source.eval_path = corpus, ""
        for stage in config.stages.values():
            stage.tokens, stage.batch_size, stage.seq_len, stage.accumulate = 256, 8, 16, 1
            stage.warmup_tokens = min(stage.warmup_tokens, 128)
            stage.decay_tokens = min(stage.decay_tokens, 128)
        config.data.streams = 1
        config.mesh.update(base.get_config().mesh)
        for name in ("eval_tokens", "final_eval_tokens"):
            config[name] = 256
        config.eval_every = config.histogram_every = config.sample_tokens = 0
        config.log_every = 1
    return config


def shrink_sweep(sweep: dict[str, Any], corpus: str) -> dict[str, Any]:
    """The first two arms of a sweep with two seeds, each a tiny run."""
    arms = dict(list(sweep["arms"].items())[:2])
    small = {name: {**arm, "model.num_units": 1} for name, arm in arms.items()}
    return {**sweep, "base": shrink(sweep["base"], corpus), "arms": small, "seeds": (0, 1)}


def write_home(home: Path) -> None:
    """Writes the folder that commands find instead of their configs and texts."""
    corpus = write_corpus(home)
    for name in CONFIGS:
        keep = ", model=False" if name == "imported" else ""
        _wrap(home / "configs" / f"{name}.py", "get_config", "shrink", f"{corpus!r}{keep}")
    for name in SWEEPS:
        _wrap(home / "configs" / "sweeps" / f"{name}.py", "get_sweep", "shrink_sweep", repr(corpus))
    (home / "texts").mkdir()
    (home / "new").mkdir()
    text = Path(corpus).read_text()
    for number in range(4):
        (home / "texts" / f"{number}.txt").write_text(text[number * 900 : number * 900 + 900])


def _wrap(file: Path, function: str, change: str, arguments: str) -> None:
    """Writes a config file that shrinks what the real one of its name returns."""
    package = ".".join(["configs", *(["sweeps"] if file.parent.name == "sweeps" else [])])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"from {package} import {file.stem} as real\nfrom tests.docs import tiny\n\n"
        f"def {function}(*given):\n"
        f"    return tiny.{change}(real.{function}(*given), {arguments})\n"
    )


def prepare(home: Path) -> list[list[str]]:
    """Command lines that make what all share: a run, a sweep, and folders of weights."""
    return [
        ["train", f"--config={home}/configs/tour.py", f"--workdir={home}/run"],
        ["train", f"--config={home}/configs/predecessor.py", f"--workdir={home}/dense"],
        ["sweep", f"--sweep={home}/configs/sweeps/pattern.py", f"--workdir={home}/sweep"],
        ["convert", "--to=hf", f"--path={home}/hf", f"--workdir={home}/run"],
        ["convert", "--from=hf", f"--path={home}/hf", f"--workdir={home}/converted"],
    ]


def substitute(call: Call, home: Path) -> list[str]:
    """The command line to run for a call of a page."""
    program = call.module.removeprefix("experiments.")
    emulated = any("device_count" in text for text in call.environment)
    given = [*_DEFAULTS.get(program, ()), *call.flags]
    flags = [_flag(flag, program, call, home, emulated) for flag in given]
    flags = [flag for flag in flags if flag]
    # Two calls that differ in the name of their folder alone are one.
    made = hashlib.sha256(" ".join([*call.environment, program, *flags]).encode()).hexdigest()[:12]
    flags = [flag.replace("{made}", f"{home}/new/{made}") for flag in flags]
    return [*map(_with_quick_compiler, call.environment), program, *flags]


def _with_quick_compiler(setting: str) -> str:
    name, _, value = setting.partition("=")
    return f"{name}={QUICK['XLA_FLAGS']} {value}" if name == "XLA_FLAGS" else setting


def _flag(flag: str, program: str, call: Call, home: Path, emulated: bool) -> str:
    if not flag.startswith("--"):  # a run, of two that are compared
        return f"{home}/{'run' if flag == call.flags[0] else 'dense'}"
    name, _, value = flag.removeprefix("--").partition("=")
    if name in _LEFT_OUT or (name.startswith("config.mesh.") and not emulated):
        return ""
    if name in ("config", "sweep"):
        file, _, argument = value.partition(":")
        file = file if "/" in file else f"configs/{file}.py"
        # All commands share one sweep; tests/ablation/test_sweep.py builds the others.
        if name == "sweep" and Path(file).stem in SWEEPS:
            file = "configs/sweeps/pattern.py"
        inside = f":{_argument(argument, home)}" if argument else ""
        return f"--{name}={home}/{file}{inside}"
    if name.startswith("config."):
        return _override(flag, name.removeprefix("config."), value, home)
    places: dict[str, Callable[[], str]] = {
        "workdir": lambda: _workdir(program, call, home),
        "path": lambda: f"{home}/hf" if "--from=hf" in call.flags else "{made}",
        "source": lambda: f"{home}/dense",
        "out": lambda: "{made}" + Path(value).suffix,
        "page": lambda: "{made}" + Path(value).suffix,
        "data": lambda: f"{home}/texts/*.txt",
        "input": lambda: f"{home}/texts/*.txt",
        "only": lambda: "G",
    }
    if name in places:
        return f"--{name}={places[name]()}"
    return f"--{name}={_SMALL[name]}" if name in _SMALL else flag


def _override(flag: str, path: str, value: str, home: Path) -> str:
    for pattern, small in _SIZES:
        if re.fullmatch(pattern, path):
            return f"--config.{path}={small}"
    is_source = re.fullmatch(r"data\.sources\.\w+(\.(eval_)?path)?", path)
    if is_source and value != "None" and not value.startswith("stdlib:"):
        return f"--config.{path}={home}/texts/*.txt"
    return flag


def _argument(argument: str, home: Path) -> str:
    """Behind the colon of a config: a run's folder, or text and a number of tokens."""
    if argument.startswith("runs/"):
        return f"{home}/converted"
    path, comma, rest = argument.partition(",")
    return str(home / "texts" / "0.txt" if Path(path).suffix else home / "texts") + comma + rest


def _workdir(program: str, call: Call, home: Path) -> str:
    if program in _READERS:
        return f"{home}/{_READERS[program]}"
    names = {flag.removeprefix("--").partition("=")[0] for flag in call.flags}
    if program == "sweep" and names <= _HOW:  # the one that all share
        return f"{home}/sweep"
    if program == "convert" and "--to=hf" in call.flags:
        return f"{home}/run"
    if any("configs/imported.py:" in flag for flag in call.flags):
        return f"{home}/converted"
    return "{made}"


def install(corpus: str) -> None:
    """In a process that runs Python of the pages: configs become tiny."""
    for name in CONFIGS:
        if name not in ("base", "imported"):  # the one that all others call, and runs' own
            module = importlib.import_module(f"configs.{name}")
            module.get_config = _shrunk(module.get_config, corpus)


def _shrunk(real: Callable[..., Any], corpus: str) -> Callable[..., Any]:
    return lambda *arguments: shrink(real(*arguments), corpus)


def python(text: str, home: Path) -> str:
    """The Python of a page, with tiny configs and, in the place of any run, the shared one."""
    text = re.sub(r"\bruns/[\w/]+", str(home / "run"), text)
    return (
        "import os\nfrom tests.docs import tiny\n"
        f"tiny.install({str(home / 'corpus.jsonl')!r})\nos.chdir({str(home / 'new')!r})\n{text}"
    )
