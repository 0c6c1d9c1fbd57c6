"""Suite `startup`: from the start of `experiments.train` to the end of its first step.

Each run is a process of its own in a fresh work folder, trained for one step of `--config`, with
empty caches (the first run on a machine) and with those of the run before (every later run). The
peer is a Python program that imports transformers, builds the same Mixtral and takes one step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Options, peer
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict

_ROOT = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.01

_PEER = """
import json, sys
from benchmarks.peers import mixtral_train_call
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build
config = build(RunConfig, json.load(open(sys.argv[1])))
stage = config.stages[0]
shape = (stage.batch_size, stage.seq_len)
print(mixtral_train_call(config.model, shape, "float32", "grouped_mm")())
"""


def run(options: Options) -> list[dict[str, Any]]:
    """Rows: one, with seconds of both kinds of start and of the peer.

    Raises:
      UserError: no config, or a run that fails.
    """
    if options.config is None:
        raise UserError("--config is missing: the startup suite starts that run")
    if not options.wants("startup"):
        return []
    config = one_step(options.config)
    seconds: dict[str, list[float]] = {"cold": [], "warm": [], "transformers": []}
    with_peer = bool(peer("torch") and peer("transformers"))
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            (path / "config.json").write_text(as_json(config))
            for name in ("cold", "warm"):
                seconds[name].append(seconds_to_first_step(path, name))
            if with_peer:
                seconds["transformers"].append(_seconds_of_peer(path))
    row: dict[str, Any] = {
        "table": "start to the end of the first step",
        "name": "startup",
        **{f"{name}_s": statistics.median(times) for name, times in seconds.items() if times},
    }
    if not with_peer:
        row["note"] = "torch or transformers is not installed (extra peers): its start is skipped"
    return [row]


def one_step(config: RunConfig) -> RunConfig:
    """The run cut down to one step of its first stage, without evaluation on the way."""
    first = config.stages[0]
    # A stage lasts whole steps: the fewest that consume its tokens.
    stage = dataclasses.replace(first, tokens=1, warmup_tokens=0, decay="none", decay_tokens=0)
    return dataclasses.replace(config, stages=(stage,), log_every=1, eval_every=0)


def as_json(config: RunConfig) -> str:
    """The fields of a run, for the processes started here."""
    return json.dumps(to_dict(config))


def seconds_to_first_step(folder: Path, name: str) -> float:
    """Starts the program on `folder/config.json` and waits for the first line of its metrics.

    Runs of one folder share its caches, of compiled programs and of parsed text.

    Raises:
      UserError: the run ends before.
    """
    workdir = folder / name
    command = [
        *(sys.executable, "-m", "experiments.train"),
        *(f"--config={_config_file(folder)}", f"--workdir={workdir}"),
    ]
    caches = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = os.environ | {name: str(folder / name.lower()) for name in caches}
    metrics, log = workdir / "metrics.jsonl", folder / f"{name}.log"
    with log.open("w") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=output
        )
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise UserError(f"the run ended before its first step: {_last_line(log)}")
                time.sleep(_POLL_SECONDS)
            return time.perf_counter() - start
        finally:
            # It would go on to evaluate; the programs compiled so far are in the cache already.
            process.kill()
            process.wait()


def _config_file(folder: Path) -> Path:
    """A config program that reads the JSON next to it."""
    path = folder / "config.py"
    path.write_text(
        "import json, pathlib\n"
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    path = pathlib.Path(__file__).with_name('config.json')\n"
        "    return ConfigDict(json.loads(path.read_text()))\n"
    )
    return path


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def _seconds_of_peer(folder: Path) -> float:
    command = [sys.executable, "-c", _PEER, str(folder / "config.json")]
    start = time.perf_counter()
    subprocess.run(command, cwd=_ROOT, check=True, capture_output=True)
    return time.perf_counter() - start
