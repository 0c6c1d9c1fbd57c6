"""The figure of a sweep's report, and the page that holds everything in one file."""

from __future__ import annotations

import contextlib
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax import pages
from lightning_jax.ablation.results import METRIC, Run
from lightning_jax.config.errors import UserError
from lightning_jax.runtime.invocation import recorded
from lightning_jax.train.metrics import read_rows
from lightning_jax.train.record import Record

_CURVE_POINTS = 40
# Okabe and Ito's palette: told apart with any colour vision.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_MARKERS = "osD^vPX*"


def curves(runs: Sequence[Run], workdir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Training loss by arm: (tokens `[points]`, loss `[seeds, points]`), averaged over windows.

    Windows divide the tokens evenly, and a curve ends where the shortest of its seeds does.
    """
    result = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        folders = [run.folder(workdir) for run in runs if run.arm == arm]
        logs = [read_rows(folder / "metrics.jsonl") for folder in folders]
        pairs = [
            np.array([(r["tokens"], r["loss"]) for r in log if r.get("loss") is not None], float)
            for log in logs
        ]
        pairs = [pair for pair in pairs if len(pair)]
        if not pairs:
            continue
        end = min(pair[-1, 0] for pair in pairs)
        rows = min(int((pair[:, 0] <= end).sum()) for pair in pairs)
        points = min(_CURVE_POINTS, max(1, rows // 2))
        edges = np.linspace(0, end, points + 1)
        centres = (edges[1:] + edges[:-1]) / 2
        result[arm] = centres, np.stack([_window_means(pair, edges, centres) for pair in pairs])
    return result


def _window_means(pair: np.ndarray, edges: np.ndarray, centres: np.ndarray) -> np.ndarray:
    tokens, loss = pair[pair[:, 0] <= edges[-1]].T
    window = np.clip(np.searchsorted(edges, tokens, side="left") - 1, 0, len(centres) - 1)
    count = np.bincount(window, minlength=len(centres))
    total = np.bincount(window, weights=loss, minlength=len(centres))
    filled = count > 0
    return np.interp(centres, centres[filled], total[filled] / count[filled])


def plot(report: dict[str, Any], curve: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Draws bits per byte against KV cache, and learning curves; returns a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    done = [arm for arm in report["arms"] if METRIC in arm]
    looks = {
        arm["arm"]: {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i // len(_COLORS) % 8]}
        for i, arm in enumerate(report["arms"])
    }
    _plot_scores(left, done, looks, report["context"])
    for arm, (tokens, losses) in curve.items():
        color = looks[arm]["color"]
        right.plot(tokens, losses.mean(axis=0), color=color, label=arm, linewidth=1.5)
        right.fill_between(tokens, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.15)
    right.set(xlabel="training tokens", ylabel="training loss (nats per token)")
    right.set_title("Learning curves: mean and range over seeds")
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    if curve:
        # The first fall is the same for all arms and would flatten their differences.
        shown = [losses[:, losses.shape[1] // 10 :] for _, losses in curve.values()]
        low, high = min(map(np.min, shown)), max(map(np.max, shown))
        right.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 1e-6)
        right.legend(title="arm", frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def _plot_scores(
    axes: Any, arms: list[dict[str, Any]], looks: dict[str, Any], context: int
) -> None:
    cost = [arm["costs"]["kv_bytes_per_token"] for arm in arms]
    by_cost = len(set(cost)) > 1
    for index, arm in enumerate(arms):
        # Arms of equal cost stand side by side; where all are equal, each has its own place.
        twins = cost[:index].count(cost[index])
        x = cost[index] * 1.06**twins if by_cost else float(index)
        score, look = arm[METRIC], looks[arm["arm"]]
        reach = [[score["mean"] - score["min"]], [score["max"] - score["mean"]]]
        axes.errorbar(x, score["mean"], reach, capsize=5, markersize=8, **look)
        seeds = [x] * len(arm["seeds"])
        axes.plot(seeds, score["by_seed"], "o", color=look["color"], markersize=4, alpha=0.5)
        axes.annotate(
            arm["arm"],
            (x, score["mean"]),
            xytext=(9, 6 + 11 * (twins % 3)),
            textcoords="offset points",
            color=look["color"],
        )
    if by_cost:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(f"KV cache, bytes per token at a context of {context // 1024}K")
    else:
        axes.set_xticks(range(len(arms)), [arm["arm"] for arm in arms])
        axes.set_xlabel("arm (all have the same KV cache)")
    axes.margins(x=0.2, y=0.15)
    axes.set_ylabel("held-out bits per byte (lower is better)")
    axes.set_title("Quality against memory: mean, range and seeds")


def build(
    report: dict[str, Any],
    header: list[str],
    rows: list[list[str]],
    gaps: list[str],
    image: bytes,
    origin: str,
) -> str:
    """Returns the page: question, table, gaps, figure, arms, how to reproduce.

    Args:
      report: result of `report.summarize`.
      header: names of the table's columns.
      rows: its cells.
      gaps: notes and missing runs, one per line.
      image: the figure, a PNG.
      origin: commands, commits and versions of the runs.
    """
    domains = list(dict.fromkeys(d for arm in report["arms"] for d in arm.get("domains", {})))
    detail = [
        [
            arm["arm"],
            ", ".join(f"{field} = {value}" for field, value in arm["changes"].items()) or "nothing",
            *[_score(arm.get("domains", {}).get(domain)) for domain in domains],
        ]
        for arm in report["arms"]
    ]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in gaps)
    columns = ["arm", "changes", *[f"bits/byte on {domain}" for domain in domains]]
    body = f"""{pages.table([header, *rows])}
{f"<ul>{items}</ul>" if gaps else ""}
<p>Held-out bits per byte over all domains: mean ± sample standard deviation over seeds. Differences
are paired by seed; the interval is Student's t at 95%.</p>
{pages.picture(image, "Bits per byte against KV cache, and learning curves")}
<h2>Arms</h2>
{pages.table([columns, *detail])}
<h2>How to reproduce</h2>
{pages.listing(origin)}
<p>Seeds {", ".join(map(str, report["seeds"]))}; every field is in sweep.json.</p>"""
    return pages.document(report["question"], body)


def origin(runs: Sequence[Run], workdir: Path) -> str:
    """Commands, commits and versions of the runs, one per line, from what `run.json` they have."""
    made: list[dict[str, Any]] = []
    for run in runs:
        with contextlib.suppress(UserError):
            made += Record.read(run.folder(workdir)).sessions
    commands = [recorded(run["command"]) for run in made]
    commits = [f"commit {run['git_commit'] or run.get('git_commit_unknown')}" for run in made]
    versions = [", ".join(map(" ".join, run["versions"].items())) for run in made]
    return "\n".join(dict.fromkeys([*commands, *commits, *versions]))


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
