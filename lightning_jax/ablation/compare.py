"""Two runs side by side: what differs in their configs, how well they predict, what they cost."""

from __future__ import annotations

import html
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax import pages, plots
from lightning_jax.ablation import results
from lightning_jax.accounting import count_text
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import changes, to_dict
from lightning_jax.runtime import tables
from lightning_jax.runtime.files import StrPath, read_json, write_file
from lightning_jax.runtime.invocation import recorded
from lightning_jax.train.metrics import pace, read_rows
from lightning_jax.train.record import Record
from lightning_jax.train.workdir import CONFIG, METRICS

_CURVE_POINTS = 8
# Names of folders and values of the config may be long.
_STYLE = "th, td { overflow-wrap: anywhere; } td:first-child { overflow-wrap: normal; }"
_CONTEXT = f"{results.COST_CONTEXT // 1024}K"
# What runs cost: key and words.
_COSTS = {
    "steps": "steps",
    "trained_tokens": "tokens",
    "train_flops": "FLOPs of training",
    "params_total": "parameters",
    "params_active": "parameters used per token",
    "experts_per_token": "experts per token",
    "kv_bytes_per_token": f"KV-cache bytes per token at {_CONTEXT}",
    "attention_flops_per_token": f"attention FLOPs per token at {_CONTEXT}",
    "tokens_per_second": "tokens per second of training",
    "seconds": "seconds of training",
}


def compare(first: StrPath, second: StrPath) -> dict[str, Any]:
    """Compares two runs, which may still be training.

    Returns:
      `runs`, two dicts with `workdir`, `finished`, the costs (see `results.run_row`; `steps` and
      `trained_tokens` so far), `command` and `commit`; `config`, the fields that differ (`field`,
      and the two `values`); `bits_per_byte` by domain and of all text (`values`, None where a run
      has none; `difference` of the second to the first, None where that is unknown or the text is
      not the same); `curve`, the smoothed training loss of both at the same `tokens`; `notes`.

    Raises:
      UserError: a folder that is not a run's or is given twice, or a damaged file.
    """
    if Path(first).resolve() == Path(second).resolve():
        raise UserError(f"{str(first)!r}: is given twice")
    pair = [_read(Path(folder)) for folder in (first, second)]
    curves = [plots.smooth_loss(run["rows"]) for run in pair]
    notes: list[str] = []
    for run in pair:
        if not run["facts"]["finished"]:
            notes.append(f"{run['facts']['workdir']} has not finished: no held-out scores.")
    texts = [{name: row["fingerprint"] for name, row in run["text"].items()} for run in pair]
    for name in texts[0]:
        if texts[1].get(name, texts[0][name]) != texts[0][name]:
            notes.append(f"The text of {name} is not the same.")
    scores = _scores([run["scores"] for run in pair], notes)
    notes.append("Two runs do not show what is chance: a sweep compares over seeds.")
    return {
        "runs": [run["facts"] for run in pair],
        "config": [
            {"field": field, "values": [old, new]}
            for field, old, new in changes(pair[0]["config"], pair[1]["config"])
        ],
        "bits_per_byte": scores,
        "curve": _curve(curves),
        "notes": notes,
    }


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{str(folder)!r}: must be the folder of a run")
    config = RunConfig.parse(read_json(path), path)
    rows = read_rows(folder / METRICS)
    row = results.read(results.Run(str(folder), config.seed), folder)
    facts: dict[str, Any] = {"workdir": str(folder), "finished": row is not None}
    steps = [logged for logged in rows if "tokens_per_second" in logged]
    speed, seconds = pace(rows)
    known = {
        "steps": steps[-1]["step"] if steps else 0,
        "trained_tokens": steps[-1]["tokens"] if steps else 0,
        "tokens_per_second": speed,
        "seconds": seconds,
        **(row or results.costs(config.model, None)),
    }
    facts |= {key: known.get(key) for key in _COSTS}
    record = Record.read(folder)
    session = record.sessions[-1] if record.sessions else None
    facts["command"] = session and recorded(session["command"])
    facts["commit"] = session and session["git_commit"]
    scores = {}
    if row is not None:
        keys = (results.METRIC, "bytes")
        scores = {name: {key: each[key] for key in keys} for name, each in row["domains"].items()}
        scores["all text"] = {key: row[key] for key in keys}
    text, values = record.known_data(), to_dict(config)
    return {"facts": facts, "scores": scores, "rows": rows, "text": text, "config": values}


def _scores(pair: list[dict[str, dict[str, float]]], notes: list[str]) -> dict[str, Any]:
    """Bits per byte by domain; adds a note where the runs were not judged on the same bytes."""
    found = {}
    for name in dict.fromkeys([*pair[0], *pair[1]]):
        rows = [scores.get(name) for scores in pair]
        old, new = (row[results.METRIC] if row else None for row in rows)
        sizes = {row["bytes"] for row in rows if row}
        if len(sizes) > 1:
            least, most = f"{min(sizes):,}", f"{max(sizes):,}"
            notes.append(
                f"Held-out bytes of {name} differ ({least} and {most}): scores are not compared."
            )
        difference = None
        if old is not None and new is not None and len(sizes) == 1:
            difference = new - old
        found[name] = {"values": [old, new], "difference": difference}
    return found


def _curve(curves: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Losses of both in the middle of equal parts of their tokens, as far as the shorter goes."""
    if not all(tokens.size for tokens, _ in curves):
        return {"tokens": [], "losses": [[], []]}
    last = min(tokens[-1] for tokens, _ in curves)
    points = ((np.arange(_CURVE_POINTS) + 0.5) / _CURVE_POINTS * last).round()
    losses = [np.interp(points, tokens, loss).tolist() for tokens, loss in curves]
    return {"tokens": points.astype(int).tolist(), "losses": losses}


def _labels(compared: Mapping[str, Any]) -> list[str]:
    """The folders, without the folders that both are in."""
    paths = [Path(run["workdir"]).absolute() for run in compared["runs"]]
    shared = Path(os.path.commonpath(paths))
    if shared in paths:
        return [str(path) for path in paths]
    return [str(path.relative_to(shared)) for path in paths]


def tables_of(compared: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Returns the tables of a comparison by their titles, header first, but those without rows."""
    names = _labels(compared)
    difference = "second - first"
    config = [[row["field"], *map(_json, row["values"])] for row in compared["config"]]
    scores = [
        [name, *(_number(value) for value in row["values"]), _signed(row["difference"])]
        for name, row in compared["bits_per_byte"].items()
    ]
    curve = compared["curve"]
    losses = [
        [f"{tokens:,}", f"{one:.4f}", f"{two:.4f}", f"{two - one:+.4f}"]
        for tokens, one, two in zip(curve["tokens"], *curve["losses"], strict=True)
    ]
    costs = [
        [words, *_cost_cells([run[key] for run in compared["runs"]])]
        for key, words in _COSTS.items()
        if any(run[key] is not None for run in compared["runs"])
    ]
    found = {
        "Held-out bits per byte (less is better)": [["text", *names, difference], *scores],
        "Training loss, smoothed, nats per token": [["tokens", *names, difference], *losses],
        "Speed and cost": [["", *names, "second / first"], *costs],
        "What differs in the config": [["field", *names], *config],
    }
    return {title: rows for title, rows in found.items() if len(rows) > 1}


def print_comparison(compared: Mapping[str, Any]) -> None:
    """Prints the tables and the notes on standard error."""
    for title, rows in tables_of(compared).items():
        tables.print_table(rows, title)
    if not compared["config"]:
        print("The configs do not differ.", file=sys.stderr)
    for note in compared["notes"]:
        print(note, file=sys.stderr)


def write_page(compared: Mapping[str, Any], path: StrPath) -> None:
    """Writes the comparison as one HTML file, and its figure beside it as PNG. UserError: disk."""
    page = Path(path)
    folders = [run["workdir"] for run in compared["runs"]]
    logs = [read_rows(Path(folder) / METRICS) for folder in folders]
    names = _labels(compared)
    rows = dict(zip(names, logs, strict=True))
    picture = plots.png(plots.losses(rows))
    tables_shown = "".join(
        f"<h2>{html.escape(title)}</h2>\n{pages.table(table)}\n"
        for title, table in tables_of(compared).items()
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in compared["notes"])
    origin = "\n".join(
        f"{run['workdir']}: {run['command'] or 'command unknown'}, commit {run['commit'] or '?'}"
        for run in compared["runs"]
    )
    body = f"""{tables_shown}<ul>{notes}</ul>
<h2>Training</h2>
{pages.picture(picture, "Training loss of both runs over tokens")}
<h2>Where they come from</h2>
{pages.listing(origin)}"""
    write_file(page, pages.document(" and ".join(names), body, _STYLE))
    write_file(page.with_suffix(".png"), picture)


def _cost_cells(pair: list[float | None]) -> list[str]:
    first, second = pair
    ratio = "-" if not first or second is None else f"x{second / first:.2f}"
    return ["-" if value is None else count_text(value) for value in pair] + [ratio]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
