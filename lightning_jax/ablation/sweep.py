"""A sweep: arms that change one base config, each trained with several seeds, one after another.

A sweep file has a function `get_sweep()` that returns a plain dict: `question`, `base` (what a
config file returns), `baseline` (the name of one arm), `arms` (by name, the config fields it
changes, `{"model.unit": "G"}`) and `seeds`. Arms of one seed see the same text in the same order,
so that their differences are paired.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lightning_jax.ablation import failures
from lightning_jax.ablation.results import (
    FAILURE,
    Run,
    collect,
    read,
    run_row,
    write_results,
)
from lightning_jax.config import RunConfig, overrides
from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.fields import build, first_change, require, to_dict
from lightning_jax.runtime import shipped
from lightning_jax.runtime.files import read_json, write_json
from lightning_jax.train import loop
from lightning_jax.train.workdir import claim

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep: every arm's config has been built once.

    `base` is a nested plain dict; `arms` maps a name to `{dotted config field: value}`.
    """

    question: str
    base: dict[str, Any]
    baseline: str
    arms: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        require(bool(self.question.strip()), "question", self.question, "what the sweep asks")
        require(bool(self.arms), "arms", self.arms, "at least one arm by name")
        for name in self.arms:
            require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name) is not None,
                "arms",
                name,
                "named with letters, digits and _.+- (the name is a folder's)",
            )
        folders = [name.lower() for name in self.arms]
        require(
            len(set(folders)) == len(folders), "arms", list(self.arms), "different without case"
        )
        require(
            self.baseline in self.arms,
            "baseline",
            self.baseline,
            suggest(self.baseline, [*self.arms]),
        )
        valid = self.seeds and all(type(seed) is int and seed >= 0 for seed in self.seeds)
        require(bool(valid), "seeds", self.seeds, "one or more numbers, 0 or above")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "different numbers")
        for name in self.arms:
            self.config(Run(name, self.seeds[0]))

    def config(self, run: Run) -> RunConfig:
        """Builds one run's config.

        Raises:
          UserError: an unknown field, or a value that the config refuses; names the arm.
        """
        try:
            return build(RunConfig, override({**self.base, "seed": run.seed}, self.arms[run.arm]))
        except UserError as error:
            raise UserError(f"arm {run.arm!r}: {error}") from error

    def runs(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
        """Lists the runs of some arms and seeds (empty: all).

        Seeds are the outer loop: a sweep cut short still compares all arms on the seeds it has.

        Raises:
          UserError: an arm or a seed that the sweep does not have.
        """
        for arm in only:
            require(arm in self.arms, "only", arm, suggest(arm, [*self.arms]))
        for seed in seeds:
            require(seed in self.seeds, "seeds", seed, f"one of {', '.join(map(str, self.seeds))}")
        return [
            Run(arm, seed)
            for seed in self.seeds
            for arm in self.arms
            if (not seeds or seed in seeds) and (not only or arm in only)
        ]


def build_sweep(values: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Sweep:
    """Builds a Sweep from the result of `get_sweep()`, or from a `sweep.json`.

    Args:
      values: the fields of Sweep; `base` may be a ConfigDict.
      changes: config fields changed in the base, and so in every arm, by flags `--config.x`.

    Raises:
      UserError: a field that is unknown, missing or refused.
    """
    require(hasattr(values, "items"), "get_sweep()", values, "a dict")
    fields = {key: overrides.plain(value) for key, value in values.items()}
    known = [field.name for field in dataclasses.fields(Sweep)]
    for key in fields:
        if key not in known:
            raise UserError(f"unknown sweep field {key}: {suggest(key, known)}")
    for key in known:
        if key not in fields:
            raise UserError(f"sweep field {key} is missing")
    for key in ("question", "baseline"):
        require(isinstance(fields[key], str), key, fields[key], "text")
    for key in ("base", "arms"):
        require(isinstance(fields[key], dict), key, fields[key], "a mapping of names")
    for arm, changed in fields["arms"].items():
        right = 'what it changes, such as {"model.unit": "G"}'
        require(isinstance(changed, dict), f"arms.{arm}", changed, right)
    require(isinstance(fields["seeds"], list), "seeds", fields["seeds"], "a list of numbers")
    fields["seeds"] = tuple(fields["seeds"])
    fields["base"] = override(fields["base"], changes or {}, prefix="--config.")
    return Sweep(**fields)


def load_sweep(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Sweep:
    """Runs a sweep file and builds a Sweep from the result of its `get_sweep()`.

    Raises:
      UserError: no such file, a fault in it (with its line), a sweep that `build_sweep` refuses, or
        an arm that is not what it seems to be.
    """
    path = Path(shipped.find(os.fspath(path), shipped.SWEEPS, f"sweep = {os.fspath(path)!r}"))
    module: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module)
        if "get_sweep" not in module:
            raise UserError("it has no function get_sweep()")
        values = module["get_sweep"]()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it may even call sys.exit(0)
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or ["?"])[-1]
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}") from error
    sweep = build_sweep(values, changes)
    for arm, changed in sweep.arms.items():
        moe = sweep.config(Run(arm, sweep.seeds[0])).model.moe
        if note := overrides.misleading(moe, {**(changes or {}), **changed}):
            raise UserError(f"arm {arm!r}: {note}")
    return sweep


def override(
    values: Mapping[str, Any], changes: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, Any]:
    """Returns a copy of nested `values` with dotted fields changed, as `config.overrides` does it.

    Raises:
      UserError: an unknown field, with a "did you mean"; the seed, which the sweep sets.
    """
    if "seed" in changes:
        raise UserError("config field seed cannot be changed here: it is what `seeds` are for")
    return overrides.override(values, changes, prefix=prefix)


def run_sweep(
    sweep: Sweep,
    workdir: str | os.PathLike[str],
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    allow_changed_data: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Trains the unfinished runs in `workdir/<arm>/seed_<n>`, and collects the results.

    Finished runs are skipped and half-done ones resume; those that failed before come last. After
    each run `results.jsonl` and `results.csv` have one row for each finished run of the folder (see
    `collect`). Whatever a run raises becomes its `failure.txt`, with a traceback if it was no bad
    input, and the next run begins; so does a run whose process was killed, in the next sweep. All
    runs share this process: one that takes more memory than there is may end it.

    Args:
      sweep: what to run.
      workdir: folder of the sweep; gets `sweep.json`.
      only: arms to run; empty: all.
      seeds: seeds to run; empty: all.
      allow_changed_data: see `train.loop.run`.

    Returns:
      The rows, and by run the one-line reason of those that failed this time, or that have a result
      or a folder which cannot be used.

    Raises:
      UserError: the folder holds runs of another sweep (names the field), or is in use.
      session.Stopped: a signal; the state has been saved.
    """
    runs = sweep.runs(only, seeds)
    with claim(workdir) as claimed:
        return _run_all(sweep, claimed.path, runs, allow_changed_data)


def _run_all(
    sweep: Sweep, root: Path, runs: Sequence[Run], allow_changed_data: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    _check_same(sweep, root)
    write_json(root / "sweep.json", {**dataclasses.asdict(sweep), "seeds": list(sweep.seeds)})
    failures.note_killed(sweep.runs(), root)
    failed: dict[str, str] = {}
    left = _unfinished(runs, root, failed)
    for number, run in enumerate(left, 1):
        title = f"run {number} of {len(left)}: {run}"
        logger.info("%s", title)
        with failures.marked(root, run):
            failure = _train(sweep, run, root, title, allow_changed_data)
        # Each run compiles programs of its own; kept, they would add up over a long sweep.
        jax.clear_caches()
        if failure:
            failed[str(run)] = failure
            gc.collect()  # An exception and the arrays of its frames may form a circle.
        write_results(root, collect(sweep.runs(), root))
    rows = collect(sweep.runs(), root)
    write_results(root, rows)
    return rows, failed


def _unfinished(runs: Sequence[Run], root: Path, failed: dict[str, str]) -> list[Run]:
    """Returns the runs to train; the reasons of those that cannot be used go to `failed`."""
    found = []
    for run in runs:
        try:
            row = read(run, run.folder(root))
        except UserError as error:
            failed[str(run)] = str(error)
            logger.error("%s: %s", run, error)
        else:
            if row is None:
                found.append(run)
            else:
                logger.info("%s: finished before", run)
    return sorted(found, key=lambda run: (run.folder(root) / FAILURE).exists())


def _train(sweep: Sweep, run: Run, root: Path, title: str, allow_changed_data: bool) -> str | None:
    """Trains a run; returns the reason, in one line, if it failed, and keeps it in its folder."""
    folder, begun = run.folder(root), time.perf_counter()
    try:
        loop.run(sweep.config(run), folder, allow_changed_data=allow_changed_data)
        row = run_row(run, folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an extension's panic is no Exception
        if isinstance(error, SystemExit) and type(error.code) is int and error.code > 128:
            raise
        reason = failures.reason(error)
        trace = "" if isinstance(error, UserError) else "\n" + traceback.format_exc()
        failures.keep(folder, f"{reason}\n{trace}")
        logger.error("%s failed: %s%s", title, reason, trace and f" (more in {folder / FAILURE})")
        return reason
    with contextlib.suppress(OSError):
        (folder / FAILURE).unlink(missing_ok=True)
    seconds = time.perf_counter() - begun
    logger.info("%s: %.4f bits per byte, %.0f s", title, row["bits_per_byte"], seconds)
    return None


def _check_same(sweep: Sweep, root: Path) -> None:
    """Raises UserError where the folder holds a run that this sweep would not make.

    A run whose config cannot be read is left to `results.read`.
    """
    if (root / "config.json").exists():
        raise UserError(f"workdir = {str(root)!r}: is a run's folder; a sweep needs one of its own")
    wanted = {str(run.folder(root)): run for run in sweep.runs()}
    for path in sorted(root.glob("*/seed_*/config.json")):
        run = wanted.get(str(path.parent))
        if run is None:
            where = path.parent.relative_to(root)
            known = path.parent.parent.name in sweep.arms
            field, value = ("seeds", sweep.seeds) if known else ("arms", [*sweep.arms])
            raise UserError(
                f"{field} = {value!r}: this workdir has a run {str(where)!r}, which is not in it"
            )
        try:
            before, now = to_dict(build(RunConfig, read_json(path))), to_dict(sweep.config(run))
        except UserError:
            continue
        if now["model"]["vocab_size"] == 0:
            # 0 means "the tokenizer's"; a run records the actual size.
            now["model"]["vocab_size"] = before["model"]["vocab_size"]
        changed = first_change(before, now)
        if changed:
            field, old, new = changed
            raise UserError(
                f"{field} = {new!r}: {run} in this workdir has {old!r}; use another --workdir "
                "or the sweep as it was"
            )
