"""Weights & Biases and trackio, as writers of a run (`train.writers`); imported when asked for.

Both keep a run under a name, and a later session goes on with it. A resumed run sends the steps
after its checkpoint again: trackers keep both points, which are equal as far as the run is exact.
"""

from __future__ import annotations

import html
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = "lightning_jax"


class WeightsAndBiases:
    """A run of Weights & Biases, in `WANDB_PROJECT`; `WANDB_MODE=offline` needs no network."""

    def __init__(self, name: str, workdir: Path, config: Mapping[str, Any]) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=name,
            resume="allow",
            dir=workdir,
            config=dict(config),
            # It would put itself between this process and its standard streams.
            settings=self._wandb.Settings(console="off", quiet=True),
        )
        # Its own count of steps refuses those that a resumed run takes again.
        self._run.define_metric("*", step_metric="step")

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log({**values, "step": step})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `writers.Writer`."""
        self._log(values, step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """See `writers.Writer`."""
        self._log({name: self._wandb.Histogram(values)}, step)

    def text(self, name: str, text: str, step: int) -> None:
        """See `writers.Writer`."""
        self._log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step)

    def close(self) -> None:
        """Waits until all is sent; offline, until it is in the run's folder."""
        self._run.finish()


class Trackio:
    """A run of trackio, in the project `TRACKIO_PROJECT`, kept by trackio on this machine."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._trackio = importlib.import_module("trackio")
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            config=dict(config),
            resume="allow",
            embed=False,
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `writers.Writer`."""
        self._run.log(dict(values), step=step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """See `writers.Writer`."""
        self._run.log({name: self._trackio.Histogram(values)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """See `writers.Writer`."""
        self._run.log({name: self._trackio.Markdown(f"```\n{text}\n```")}, step=step)

    def close(self) -> None:
        """Waits until all is in the database."""
        self._run.finish()
