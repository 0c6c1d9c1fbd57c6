"""Where the curves and texts of a run go besides `metrics.jsonl`: one small interface.

Writers are chosen by name for each session, and are not part of the experiment: a resumed run may
have others. Those that depend on a network never stop a run: their first failure is said, all are
counted, and the run goes on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightning_jax.config import kinds
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import suggest
from lightning_jax.runtime import invocation
from lightning_jax.runtime.files import read_json, write_json
from lightning_jax.runtime.phases import phase
from lightning_jax.train import tags
from lightning_jax.train.events import EventFile, drop
from lightning_jax.train.trackers import Trackio, WeightsAndBiases

logger = logging.getLogger(__name__)

# The name of the run in trackers, so that a later session writes to the same one.
_KEPT = "trackers.json"
DEFAULT = ("tensorboard",)


class Writer(Protocol):
    """Takes what a run shows; steps are optimizer steps of the run."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Takes one number for each of several curves."""

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Takes finite numbers, at least one."""

    def text(self, name: str, text: str, step: int) -> None:
        """Takes a text, which is shown as it is."""

    def close(self) -> None:
        """Returns when all that was taken is written."""


@dataclasses.dataclass(frozen=True)
class Place:
    """What a writer is opened for.

    Attributes:
      workdir: folder of the run.
      config: of the run, as a nested dict.
      resume_step: steps that earlier sessions took and saved.
      final_step: steps of the whole run, at whose end every session evaluates.
    """

    workdir: Path
    config: Mapping[str, Any]
    resume_step: int
    final_step: int | None


def _tensorboard(place: Place) -> Writer:
    def is_dropped(step: int, name: str) -> bool:
        again = step == place.final_step and tags.is_of_evaluation(name)
        return step > place.resume_step or again or name == "config"

    folder = place.workdir / "tensorboard"
    drop(folder, is_dropped)
    events = EventFile(folder, first_step=place.resume_step + 1)
    events.text("config", json.dumps(place.config, indent=2), place.resume_step)
    return events


def _wandb(place: Place) -> Writer:
    return WeightsAndBiases(_tracked_name(place.workdir), place.workdir, place.config)


def _trackio(place: Place) -> Writer:
    return Trackio(_tracked_name(place.workdir), place.config)


_MAKERS: dict[str, Callable[[Place], Writer]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
_MAY_FAIL = ("wandb", "trackio")


def require(names: Sequence[str]) -> None:
    """Raises UserError for a name that is no writer's, is given twice, or is not installed."""
    if len(set(names)) < len(names):
        raise UserError(f"writers: {','.join(names)}: a name is given twice")
    for name in names:
        if name not in _MAKERS:
            raise UserError(f"writers: {name!r}: must be {suggest(name, [*_MAKERS])}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"writers: {name} is not installed: {invocation.install(name)}")


class OpenWriter:
    """A writer that is opened by its first call: its imports must not delay the first step."""

    def __init__(self, name: str, place: Place) -> None:
        self._name, self._place = name, place
        self._writer: Writer | None = None
        self._is_broken = False
        self._failures = 0

    def __call__(self, method: str, *args: Any) -> None:
        """Calls a method of `Writer`; an error of a tracker is counted."""
        if self._is_broken:
            self._failures += 1
            return
        try:
            if self._writer is None:
                with phase(f"opening {self._name}"):
                    self._writer = _MAKERS[self._name](self._place)
            getattr(self._writer, method)(*args)
        except Exception as error:
            if self._name not in _MAY_FAIL:
                raise
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._failures:
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s: %s; the run goes on", self._name, reason[:300])
        self._failures += 1
        # Opening may wait long for a network: not again at every step.
        self._is_broken = self._writer is None

    def close(self) -> None:
        """Closes the writer if it was opened, and says how often it has failed."""
        if self._writer is not None:
            with phase(f"closing {self._name}"):
                self("close")
        if self._failures:
            logger.warning("%s: %d calls failed", self._name, self._failures)


def _tracked_name(workdir: Path) -> str:
    """Returns the name of the run in trackers: its folder's, and letters of its own."""
    path = workdir / _KEPT
    found = read_json(path, missing_ok=True)
    if not found:
        found = {"name": f"{workdir.name}-{secrets.token_hex(3)}"}
        write_json(path, found)
    kinds.check(found, {"name": kinds.TEXT}, str(path), required=["name"])
    return found["name"]
