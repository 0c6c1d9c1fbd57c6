"""Quality and cost of one run of a sweep, read from the run's folder."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax import accounting
from lightning_jax.config import ModelConfig, RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.runtime.files import read_json, write_file
from lightning_jax.train.metrics import read_rows

METRIC = "bits_per_byte"
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
    return (folder / "evaluation.json").exists()


def collect(runs: Sequence[Run], workdir: Path) -> list[dict[str, Any]]:
    """Returns `run_row` of every run that has finished, in the order given."""
    found = [(run, run.folder(workdir)) for run in runs]
    return [run_row(run, folder) for run, folder in found if is_finished(folder)]


def run_row(run: Run, folder: Path) -> dict[str, Any]:
    """Reads one finished run.

    Returns `arm`, `seed`; held-out `loss` (nats per token) over all tokens, `bits_per_byte` over
    all bytes, their `tokens` and `bytes`, `domains` with the same by domain; `experts_per_token`
    (routed, mean over layers; None without); costs (see `costs`); `tokens_per_second` (median over
    logged windows, so that compilation does not count) and `seconds` of training, summed over
    sessions.

    Raises:
      UserError: a file of the run is missing or damaged.
    """
    domains = read_json(folder / "evaluation.json")
    path = folder / "config.json"
    model = RunConfig.parse(read_json(path), path).model
    keys = ("loss", "bits_per_byte", "tokens", "bytes")
    try:
        tokens = sum(domain["tokens"] for domain in domains.values())
        size = sum(domain["bytes"] for domain in domains.values())
        nats = sum(domain["loss"] * domain["tokens"] for domain in domains.values())
        bits = sum(domain["bits_per_byte"] * domain["bytes"] for domain in domains.values())
        by_domain = {name: {key: row[key] for key in keys} for name, row in domains.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'evaluation.json'}: not an evaluation ({error!r})") from error
    used = [
        row["experts_per_token"] * row["tokens"]
        for row in domains.values()
        if "experts_per_token" in row
    ]
    experts = sum(used) / max(tokens, 1) if used else None
    steps = [row for row in read_rows(folder / "metrics.jsonl") if "tokens_per_second" in row]
    windows = np.diff([0, *(row["tokens"] for row in steps)])
    speeds = [row["tokens_per_second"] for row in steps]
    return {
        "arm": run.arm,
        "seed": run.seed,
        "bits_per_byte": bits / max(size, 1),
        "loss": nats / max(tokens, 1),
        "tokens": tokens,
        "bytes": size,
        "domains": by_domain,
        "experts_per_token": experts,
        **costs(model, experts),
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "seconds": sum(
            n / speed for n, speed in zip(windows.tolist(), speeds, strict=True) if speed
        ),
    }


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
    flat = [_flat(row) for row in rows]
    table = io.StringIO()
    # Arms may have domains of their own: the columns are those of all rows.
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in flat for key in row)))
    writer.writeheader()
    writer.writerows(flat)
    write_file(root / "results.csv", table.getvalue())


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = prefix + key
        flat.update(_flat(value, f"{name}/") if isinstance(value, dict) else {name: value})
    return flat
