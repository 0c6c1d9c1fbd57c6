"""A newcomer's first minutes: from `git clone` to the end of `make quickstart`, timed.

    python -m benchmarks.first_minutes --out=benchmarks/results/first_minutes.json
    python -m benchmarks.first_minutes --package_cache=FOLDER   # the second time, its cache is warm

Everything is new: a clone of what this checkout has committed, its virtual environment, the home
folder and all caches. Kept are pip's settings, which say where packages come from, and, in the
folder `--package_cache`, the packages that pip downloads. Prints JSON on stdout and a table on
stderr, with what the program itself prints between them.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lightning_jax.config.errors import UserError
from lightning_jax.runtime import files, program

SUITE = "first_minutes"
COMMAND = ("make", "quickstart")
CLONE, RUN = "lightning_jax", Path("runs") / "quickstart"
# What the first line of a moment holds, in the order in which the moments come.
MOMENTS = {"installed": "[setup] done", "first_step": "step 1/", "first_sample": "A sample, from"}
_ROOT = Path(__file__).resolve().parents[1]
# Variables of the calling shell that would let it help: environments, caches, tuned libraries.
_FOREIGN = (
    *("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "CONDA_PREFIX"),
    *("JAX_COMPILATION_CACHE_DIR", "GLIBC_TUNABLES", "XLA_FLAGS"),
    *("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VENV", "WORKDIR", "PYTHON"),
)

_OUT = flags.DEFINE_string("out", None, "File for the JSON, besides standard output.")
_PACKAGES = flags.DEFINE_string(
    "package_cache", None, "Folder that keeps pip's downloads for the next call; else a new one."
)


@dataclasses.dataclass
class Log:
    """The lines of a program with the seconds at which they came, since `begin`."""

    begin: float
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    longest_silence: float = 0.0
    before_silence: str = ""

    def read(self, lines: Iterable[str]) -> Iterator[str]:
        """Passes lines on; notes the first line of each moment, and the longest silence."""
        last, last_line = time.perf_counter(), "the start"
        for line in lines:
            now = time.perf_counter()
            if now - last > self.longest_silence:
                self.longest_silence, self.before_silence = now - last, last_line
            last, last_line = now, line.strip()
            for moment, mark in MOMENTS.items():
                if mark in line:
                    self.seconds.setdefault(moment, now - self.begin)
            yield line


def environment(home: Path, package_cache: Path) -> dict[str, str]:
    """This process's variables, but with an empty home and caches of its own in `home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith("XDG_")
    }
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    settings = Path(config) / "pip" / "pip.conf"
    if settings.is_file():
        kept.setdefault("PIP_CONFIG_FILE", str(settings))
    return kept | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "XDG_DATA_HOME": str(home / ".local" / "share"),
        "PIP_CACHE_DIR": str(package_cache),
    }


def measure(folder: Path, package_cache: Path) -> list[dict[str, Any]]:
    """Clones this checkout into `folder` and runs the quickstart there.

    Returns:
      A row for each of `MOMENTS` and one for the end, with the minutes since the start of the
      clone; then one with whether the package cache was "empty" or "warm", the processor minutes
      of all processes, the longest time in which nothing was printed, the line before it, and
      held-out bits per byte by domain.

    Raises:
      UserError: a command fails, or does not print a line of `MOMENTS`.
    """
    clone, home = folder / CLONE, folder / "home"
    for path in (home, package_cache):
        path.mkdir(parents=True, exist_ok=True)
    state = "warm" if any(package_cache.iterdir()) else "empty"
    log, used = Log(time.perf_counter()), _processor_seconds()
    _run(log, ["git", "clone", "--quiet", str(_ROOT), str(clone)], folder, dict(os.environ))
    _run(log, COMMAND, clone, environment(home, package_cache))
    seconds = log.seconds | {"end": time.perf_counter() - log.begin}
    if missing := [moment for moment in MOMENTS if moment not in seconds]:
        raise UserError(f"{' '.join(COMMAND)} printed no line with {MOMENTS[missing[0]]!r}")
    evaluation = files.read_json(clone / RUN / "evaluation.json")
    return [
        *(
            {"table": "minutes from git clone", "name": moment, "minutes": seconds[moment] / 60}
            for moment in (*MOMENTS, "end")
        ),
        {
            "table": "the run",
            "name": " ".join(COMMAND),
            "package_cache": state,
            "processor_min": (_processor_seconds() - used) / 60,
            "longest_silence_s": log.longest_silence,
            "before_silence": log.before_silence,
            **{f"{name}_bits_per_byte": row["bits_per_byte"] for name, row in evaluation.items()},
        },
    ]


def _run(log: Log, command: Sequence[str], folder: Path, variables: dict[str, str]) -> None:
    with subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in log.read(process.stdout):
            print(line, end="", file=sys.stderr, flush=True)
    if process.returncode:
        raise UserError(f"{' '.join(command)}: exit status {process.returncode}")


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """The program."""
    if _OUT.value is not None:
        files.check_output("out", _OUT.value)
    if _PACKAGES.value is not None:
        files.check_output_folder("package_cache", _PACKAGES.value)
    from benchmarks import report

    with tempfile.TemporaryDirectory(prefix="first_minutes_") as name:
        folder = Path(name)
        packages = Path(_PACKAGES.value).absolute() if _PACKAGES.value else folder / "packages"
        found = report.describe(SUITE, lambda: measure(folder, packages), rounds=1)
        # What ran is the clone, in its own environment: this checkout may have gone on meanwhile.
        session = files.read_json(folder / CLONE / RUN / "run.json")["sessions"][-1]
        found["commit"] = session["git_commit"]
        found["versions"] = {"python": session["python"], **session["versions"]}
    report.print_tables(found)
    try:
        program.emit_json(found)
    finally:
        if _OUT.value is not None:
            report.write(found, _OUT.value)


if __name__ == "__main__":
    program.run(main, huge_pages=False)
