"""Searches remat policies and micro-batches for the fastest train step that fits.

Each candidate is a compilation of a minute or more, so their number has a bound, and what was
compiled is kept in the user's cache folder by a digest of everything that it depends on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_jax.aot import compiling, topologies
from lightning_jax.aot.compiling import Task
from lightning_jax.aot.programs import Shape, segment_of
from lightning_jax.aot.topologies import Slice
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.config.model import REMATS
from lightning_jax.runtime import files

logger = logging.getLogger(__name__)

# From the fewest FLOPs to the fewest bytes.
_REMATS = ("none", "dots_with_no_batch_dims_saveable", "full")
_PACKAGE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Space:
    """What is tried.

    Attributes:
      remats: values of `model.remat`; () for three of them.
      accumulates: numbers of micro-batches; () for the powers of two that divide the batch.
      most: compilations at the most; what a cache answers does not count.
    """

    remats: tuple[str, ...] = ()
    accumulates: tuple[int, ...] = ()
    most: int = 8

    def check(self) -> None:
        """Raises UserError for a policy or a number that cannot be."""
        for remat in self.remats:
            require(remat in REMATS, "remats", remat, f"one of {', '.join(REMATS)}")
        for number in self.accumulates:
            require(number >= 1, "accumulates", number, "at least 1")
        require(self.most >= 1, "max_compiles", self.most, "at least 1")


def search(
    config: RunConfig,
    topology: Slice,
    shape: Shape,
    space: Space,
    *,
    run: Callable[[Task], dict[str, Any]] = compiling.run_task,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Compiles the train step of candidates.

    Of each policy it takes more micro-batches until the step fits, and no more: they only repeat
    work. The best candidate fits and has the shortest `scheduled_s`.

    Args:
      config: as `compiling.check` returns it.
      topology, shape: as for `compiling.compile_all`.
      space: what is tried.
      run: compiles a task.
      cache: folder of earlier answers; None keeps nothing.

    Returns:
      `compiling.about`, `candidates` (one row each), `left_out` (those beyond the bound), and as
      `programs.train` the report on the best one, None if nothing fits.
    """
    compiled, tried, left_out = 0, [], []
    best: dict[str, Any] | None = None
    done: set[str] = set()
    for remat, accumulate, candidate in _candidates(config, shape, space):
        if remat in done:
            continue
        name = {"remat": remat, "accumulate": accumulate}
        task = Task(candidate, topology, "train", shape)
        file = cache and cache / f"{digest(task)}.json"
        entry = files.read_json(file) if file and file.exists() else None
        if entry is None and compiled == space.most:
            left_out.append(name)
            continue
        if entry is None:
            logger.info("compiling remat=%s accumulate=%d for %s", remat, accumulate, topology)
            try:
                entry = run(task)
            except UserError as error:
                tried.append({**name, "refused": str(error)})
                continue
            compiled += 1
            _keep(file, entry)
        tried.append({**name, **_row(entry)})
        if entry["fits"]:
            done.add(remat)
            if best is None or _time(entry) < _time(best):
                best = entry
    found = {**compiling.about(config, topology), "candidates": tried, "left_out": left_out}
    return {**found, "programs": {"train": best}}


def cache_folder() -> Path | None:
    """Returns the folder of earlier answers in the user's cache folder; None without a home."""
    home = files.user_folder()
    return home and home / "aot"


def digest(task: Task) -> str:
    """Returns a digest of all that an answer depends on: the task, the versions, our own code."""
    content = hashlib.sha256(
        json.dumps([task.request(), topologies.versions()], sort_keys=True).encode()
    )
    for path in sorted(_PACKAGE.rglob("*.py")):
        content.update(path.read_bytes())
    return content.hexdigest()[:32]


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Rows, header first, of the candidates of a search."""
    table = [["remat", "micro-batches", "fits", "peak GiB", "step ms", "MFU", ""]]
    for row in found["candidates"]:
        first = [row["remat"], str(row["accumulate"])]
        if "refused" in row:
            table.append([*first, "-", "-", "-", "-", row["refused"]])
            continue
        fits = "yes" if row["fits"] else "no"
        peak, step = f"{row['peak'] / 2**30:.2f}", f"{row['scheduled_s'] * 1e3:.4g}"
        table.append([*first, fits, peak, step, f"{row['scheduled_mfu']:.1%}", ""])
    return table


def _candidates(
    config: RunConfig, shape: Shape, space: Space
) -> Iterator[tuple[str, int, RunConfig]]:
    stage = segment_of(config, shape.stage).stage
    powers = [2**power for power in range(stage.batch_size.bit_length())]
    numbers = space.accumulates or tuple(n for n in powers if stage.batch_size % n == 0)
    for number in sorted(numbers):
        for remat in space.remats or _REMATS:
            changed = dataclasses.replace(stage, accumulate=number)
            stages = tuple(changed if s.name == stage.name else s for s in config.stages)
            model = dataclasses.replace(config.model, remat=remat)
            yield remat, number, dataclasses.replace(config, model=model, stages=stages)


def _keep(file: Path | None, entry: dict[str, Any]) -> None:
    """Keeps an answer for the next search; a cache only saves time."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, entry)
    except (OSError, UserError) as error:
        logger.debug("%s is not kept: %s", file, error)


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    time = entry["roofline"]
    return {
        "fits": entry["fits"],
        "peak": entry["memory"]["peak"],
        **{name: time[name] for name in ("step_s", "scheduled_s", "mfu", "scheduled_mfu")},
    }


def _time(entry: dict[str, Any]) -> float:
    return entry["roofline"]["scheduled_s"]
