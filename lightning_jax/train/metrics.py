"""Output of metrics: `metrics.jsonl`, and the writers that a session has besides.

`metrics.jsonl` has one JSON object per logged step: scalars, and one list over layers for each
router metric, so that the number of keys does not grow with depth or experts. A resumed run drops
the lines that it is about to write again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.config import kinds
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import LARGEST_COUNT
from lightning_jax.runtime import output
from lightning_jax.runtime.files import parse_json, plain, write_file
from lightning_jax.train import tags, writers

# What readers of `metrics.jsonl` take from a row; a loss that was not finite is null.
_ROW = {
    "step": kinds.integer(0),
    "stage": kinds.TEXT,
    "tokens": kinds.integer(1, LARGEST_COUNT),
    "loss": kinds.or_null(kinds.number()),
    "tokens_per_second": kinds.number(0),
    "eval": kinds.OBJECT,
}


def flatten(metrics: dict[str, Any]) -> dict[str, Any]:
    """Turns one step's metrics (arrays) into JSON values; router metrics `[U, R]` become lists.

    Objects stay objects. A number that is not finite becomes `None`, at every depth: JSON has
    no NaN.
    """
    row: dict[str, Any] = {}
    for name, value in metrics.items():
        if name == "router":
            for key, per_layer in value.items():
                array = np.asarray(per_layer)
                row[key] = plain(array.reshape(-1, *array.shape[2:]))
        elif isinstance(value, dict):
            row[name] = plain(value)
        else:
            row[name] = plain(np.asarray(value))
    return row


def pace(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float]:
    """Returns tokens per second and seconds of training, of a run's rows, over all its sessions.

    The speed is the median over logged windows, so that compilation does not count; None if no step
    was logged.
    """
    steps = [row for row in rows if "tokens_per_second" in row]
    windows = np.diff([0, *(row["tokens"] for row in steps)]).tolist()
    speeds = [row["tokens_per_second"] for row in steps]
    seconds = sum(n / speed for n, speed in zip(windows, speeds, strict=True) if speed)
    return (float(np.median(speeds)) if speeds else None), seconds


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and gives the same values to other writers."""

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int,
        final_step: int | None = None,
        config: Mapping[str, Any] | None = None,
        names: Sequence[str] = writers.DEFAULT,
    ):
        """Opens the files, without what earlier sessions wrote of steps after `resume_step`.

        Args:
          workdir: folder of the run.
          resume_step: steps that earlier sessions took and saved.
          final_step: steps of the whole run, at whose end every session evaluates: TensorBoard
            forgets what earlier sessions have written there.
          config: of the run, as a nested dict, for other writers.
          names: of other writers, see `writers.require`.

        Raises:
          UserError: a file is damaged, or is not the kind of file that it must be.
        """
        directory = workdir / "tensorboard"
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: must be a folder")
        path = workdir / "metrics.jsonl"
        _drop_rows_after(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")
        place = writers.Place(workdir, config or {}, resume_step, final_step)
        self._others = [writers.OpenWriter(name, place) for name in names]
        self._last_step, self._told = resume_step, False

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row; it must have a `step`. The line is on disk when this returns.

        Numbers that are not finite are written as null, at every depth. The first row after a loss
        of output to standard error says so, as `output_lost`.
        """
        if output.lost() and not self._told:
            row, self._told = {**row, "output_lost": output.lost()}, True
        row = plain(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = row["step"]
        self._show(row)

    def last_evaluation(self, results: dict[str, Any], step: int) -> None:
        """Shows, but in `metrics.jsonl`, what `evaluation.json` has."""
        self._show(plain({"step": step, "eval": results}))

    def _show(self, row: dict[str, Any]) -> None:
        curves = tags.of_row(row)
        for writer in self._others:
            writer("scalars", curves, row["step"])

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Shows a histogram of the numbers of an array; None is left out."""
        found = np.asarray(values, np.float64).reshape(-1)
        if (found := found[np.isfinite(found)]).size:
            for writer in self._others:
                writer("histogram", name, found, step)

    def sample(self, text: str, step: int) -> None:
        """Shows a text that the model wrote."""
        for writer in self._others:
            writer("text", tags.SAMPLE, text, step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file and the other writers."""
        if output.lost() and not self._told:
            self._file.write(json.dumps({"step": self._last_step, "output_lost": output.lost()}))
            self._file.write("\n")
        self._file.close()
        for writer in self._others:
            writer.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`; a last line cut by a kill is left out.

    Raises:
      UserError: the file cannot be read, or a whole line is not a row with a step; names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    rows = []
    # What follows the last line end is empty, or what a kill has cut.
    for number, line in enumerate(lines[:-1], 1):
        where = f"{path}: line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be a JSON object, not {type(row).__name__}")
        # Training steps are logged with their speed and place, evaluations with the step alone.
        required = ["step", "tokens"] if "tokens_per_second" in row else ["step"]
        kinds.check(row, _ROW, where, required=required)
        rows.append(row)
    return rows


def _drop_rows_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
