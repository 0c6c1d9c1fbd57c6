"""Quality and cost of one run of a sweep, read from the run's folder."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax import accounting
from lightning_jax.ablation import training_cost
from lightning_jax.config import ModelConfig, RunConfig, kinds
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import LARGEST_COUNT, require
from lightning_jax.runtime.files import read_json, write_file
from lightning_jax.train.metrics import pace, read_rows
from lightning_jax.train.workdir import CONFIG, EVALUATION, METRICS

METRIC = "bits_per_byte"
# Of a domain in evaluation.json.
_DOMAIN = {
    "loss": kinds.number(-1e6, 1e6),
    METRIC: kinds.number(0, 1e6),
    "tokens": kinds.integer(1, LARGEST_COUNT),
    "bytes": kinds.integer(1, LARGEST_COUNT),
    "experts_per_token": kinds.number(0, 1e6),
    "no_bits_per_byte": kinds.TEXT,
    "recall": kinds.OBJECT,
}
_KEYS = ("loss", METRIC, "tokens", "bytes")
_LOADS = {"load_max_over_mean": kinds.list_of(kinds.number(0, LARGEST_COUNT))}
# Why a run failed, in one line; below it the traceback of what was no bad input.
FAILURE = "failure.txt"
COST_CONTEXT = 65_536  # tokens of context at which memory and attention are counted


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}"

    def folder(self, workdir: Path) -> Path:
        """The run's own folder inside the sweep's."""
        return workdir / self.arm / f"seed_{self.seed}"


def is_finished(folder: Path) -> bool:
    """Whether a run's folder has its last evaluation."""
    return (folder / EVALUATION).exists()


def read(run: Run, folder: Path) -> dict[str, Any] | None:
    """Returns `run_row` of a run that has finished; None for one that has not.

    Raises:
      UserError: a file of the run is missing or damaged, or something else has the folder's name.
    """
    for path in (folder.parent, folder):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{path}: must be a folder")
    if is_finished(folder):
        return run_row(run, folder)
    if (folder / CONFIG).exists():
        read_json(folder / CONFIG)
    return None


def outcome(run: Run, workdir: Path) -> tuple[dict[str, Any] | None, str]:
    """Returns a run's row, or None and the reason why it has none."""
    folder = run.folder(workdir)
    try:
        row = read(run, folder)
        if row is not None:
            return row, ""
        if (folder / FAILURE).exists():
            reason = (folder / FAILURE).read_text(encoding="utf-8", errors="replace")
            return None, f"failed: {(reason.splitlines() or ['?'])[0]}"
        steps = read_rows(folder / METRICS)
    except (UserError, OSError) as error:
        return None, str(error)
    return None, f"stopped at step {steps[-1]['step']}" if steps else "not started"


def collect(runs: Sequence[Run], workdir: Path) -> list[dict[str, Any]]:
    """Returns `run_row` of every run that has finished, in the order given."""
    rows = [outcome(run, workdir)[0] for run in runs]
    return [row for row in rows if row is not None]


def run_row(run: Run, folder: Path) -> dict[str, Any]:
    """Reads one finished run.

    Returns `arm`, `seed`; held-out `loss` (nats per token) over all tokens, `bits_per_byte` over
    all bytes, their `tokens` and `bytes`, `domains` with the same by domain; `experts_per_token`
    (routed, mean over layers; None without); `load_max_over_mean`, how many times the mean the
    busiest expert had in training (mean over layers and the last tenth of the logged steps; None
    without experts); costs (see `costs`); `tokens_per_second` (median over
    logged windows, so that compilation does not count) and `seconds` of training, summed over
    sessions; `train_tokens`, and the `train_flops` that the model needed for them, with the experts
    that tokens used in each stage (None if they are neither logged nor known).

    Raises:
      UserError: a file of the run is missing or damaged, or nothing finite was measured.
    """
    score = held_out(folder / EVALUATION)
    path = folder / CONFIG
    config = RunConfig.parse(read_json(path), path)
    path = folder / METRICS
    steps = read_rows(path)
    speed, seconds = pace(steps)
    stages = training_cost.measured(steps, path)
    return {
        "arm": run.arm,
        "seed": run.seed,
        **score,
        **costs(config.model, score["experts_per_token"]),
        "load_max_over_mean": _busiest(steps, path),
        "tokens_per_second": speed,
        "seconds": seconds,
        "train_tokens": training_cost.tokens(config),
        "train_flops": training_cost.training_flops(config, stages),
    }


def _busiest(steps: Sequence[Mapping[str, Any]], path: Path) -> float | None:
    logged = [row for row in steps if "load_max_over_mean" in row]
    for row in logged:
        kinds.check(row, _LOADS, path, required=())
    last = logged[9 * len(logged) // 10 :]
    return float(np.mean([np.mean(row["load_max_over_mean"]) for row in last])) if last else None


def read_by_arm(
    path: Path, record: Mapping[str, kinds.Kind], *, required: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Reads a file of a sweep's folder that has one object for each arm; empty without the file.

    Raises:
      UserError: the file is damaged, or an arm's object is not what `record` says.
    """
    found = read_json(path, missing_ok=True)
    kinds.check(found, dict.fromkeys(found, kinds.OBJECT), path, required=())
    for arm, values in found.items():
        kinds.check(values, record, f"{path}: {arm}", required=required)
    return found


def held_out(path: Path) -> dict[str, Any]:
    """Reads an evaluation of all domains of a run.

    Returns `bits_per_byte`, `loss`, `tokens`, `bytes`, `domains` and `experts_per_token`, see
    `run_row`. Recall tasks count in `domains` alone, unless there is nothing else: most of their
    text is random.

    Raises:
      UserError: the file is missing or damaged, or nothing finite was measured.
    """
    every = _domains(path)
    domains = {name: row for name, row in every.items() if "recall" not in row} or every
    tokens = sum(domain["tokens"] for domain in domains.values())
    size = sum(domain["bytes"] for domain in domains.values())
    nats = sum(domain["loss"] * domain["tokens"] for domain in domains.values())
    bits = sum(domain[METRIC] * domain["bytes"] for domain in domains.values())
    by_domain = {name: {key: row[key] for key in _KEYS} for name, row in every.items()}
    used = [
        row["experts_per_token"] * row["tokens"]
        for row in domains.values()
        if "experts_per_token" in row
    ]
    return {
        METRIC: bits / size,
        "loss": nats / tokens,
        "tokens": tokens,
        "bytes": size,
        "domains": by_domain,
        "experts_per_token": sum(used) / tokens if used else None,
    }


def _domains(path: Path) -> dict[str, dict[str, Any]]:
    """Reads an evaluation.json, every domain of which has been measured."""
    try:
        domains = read_json(path)
    except UserError as error:
        if "not a finite number" in str(error):
            raise UserError(f"{METRIC} is not finite") from error
        raise
    if not domains:
        raise UserError(f"{path}: nothing was measured")
    for name, domain in domains.items():
        try:
            require(isinstance(domain, dict), name, domain, "an object")
            if isinstance(reason := domain.get("no_bits_per_byte"), str):
                raise UserError(f"{name} has no {METRIC}: {reason}")
            if None in (domain.get("loss", 0), domain.get(METRIC, 0)):
                raise UserError(f"{METRIC} is not finite")
            kinds.check(domain, _DOMAIN, name, required=_KEYS)
        except UserError as error:
            raise UserError(f"{path}: not an evaluation ({error})") from error
    return domains


def costs(model: ModelConfig, experts_per_token: float | None) -> dict[str, float]:
    """Returns the size of a model, and its cost per token at a context of `COST_CONTEXT` tokens.

    `params_total`, `params_active` (per token, embedding included), `kv_bytes_per_token` (16 bit)
    and `attention_flops_per_token` (scores and weighted values, mean over a prefill).

    Args:
      model: with its vocabulary's size.
      experts_per_token: measured routed experts per token; None without experts.
    """
    size = accounting.parameters(model, experts_per_token)
    return {
        "params_total": size.total,
        "params_active": size.active,
        "kv_bytes_per_token": accounting.kv_bytes_per_token(model, COST_CONTEXT),
        "attention_flops_per_token": accounting.attention_flops(model, COST_CONTEXT) / COST_CONTEXT,
    }


def write_results(root: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `results.jsonl`, and `results.csv` with nested names joined by slashes."""
    write_file(root / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_file(root / "results.csv", csv_text([_flat(row) for row in rows]))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV. Arms may have domains of their own: the columns are those of all."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = prefix + key
        flat.update(_flat(value, f"{name}/") if isinstance(value, dict) else {name: value})
    return flat
