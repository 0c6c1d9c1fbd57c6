"""Runs of a sweep, one after another: what is finished is skipped, what fails is a row."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lightning_jax.ablation import failures
from lightning_jax.ablation.results import FAILURE, Run, collect, read, run_row, write_results
from lightning_jax.ablation.sweep import Sweep
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, first_change, to_dict
from lightning_jax.runtime.files import read_json, write_json
from lightning_jax.train import loop
from lightning_jax.train.workdir import claim

logger = logging.getLogger(__name__)


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
