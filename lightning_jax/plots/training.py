"""Figures of a run as it trained, from the rows of its `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lightning_jax.infer.readings import TextScore
from lightning_jax.plots.common import BLACK, BLUE, COLORS, GREEN, ORANGE

_CURVE_POINTS = 200


def loss(
    rows: Sequence[Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]] | None = None
) -> Figure:
    """Draws the training loss over tokens, its stages shaded, and the held-out loss by domain.

    Args:
      rows: of `metrics.jsonl`, as `train.metrics.read_rows` gives them.
      results: the last evaluation, by domain, as `evaluation.json` has it.
    """
    trained = [row for row in rows if row.get("loss") is not None]
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    axes = figure.subplots()
    tokens, smooth = smooth_loss(rows)
    axes.plot(tokens, [row["loss"] for row in trained], color=BLUE, alpha=0.25, lw=1)
    axes.plot(tokens, smooth, color=BLUE, lw=1.8, label="training")
    for number, (name, begin, end) in enumerate(_stages(trained)):
        axes.axvspan(begin, end, color="#000000" if number % 2 else "#FFFFFF", alpha=0.05, lw=0)
        axes.text((begin + end) / 2, 1.02, name, transform=axes.get_xaxis_transform(), ha="center")
    held_out = _held_out(rows, trained, results or {})
    for (domain, points), color in zip(held_out.items(), (ORANGE, GREEN, BLACK) * 9, strict=False):
        shown: dict[str, Any] = dict(
            color=color, ms=4, label=f"held out: {domain}", clip_on=False, zorder=3
        )
        axes.plot(*zip(*points, strict=True), "o-", **shown)
    axes.set(xlabel="tokens", ylabel="loss, nats per token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0)
    axes.legend(frameon=False)
    return figure


def losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draws the smoothed training loss of runs over tokens.

    The vertical axis leaves out what all runs lose in the first tenth of their tokens.

    Args:
      runs: by the name that the legend shows, rows of `metrics.jsonl`.
    """
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    axes = figure.subplots()
    shown = []
    for (name, rows), color in zip(runs.items(), COLORS * len(runs), strict=False):
        tokens, smooth = smooth_loss(rows)
        axes.plot(tokens, smooth, color=color, lw=1.5, label=name)
        shown += smooth[len(smooth) // 10 :].tolist()
    if shown:
        room = 0.05 * (max(shown) - min(shown)) + 1e-6
        axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set(xlabel="tokens", ylabel="training loss, nats per token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def smooth_loss(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and training loss, nats per token, of a run's logged steps.

    The loss is averaged over windows that reach as far back as forward, shorter at both ends. Steps
    whose loss was not finite are left out.

    Args:
      rows: of `metrics.jsonl`.
    """
    trained = [row for row in rows if row.get("loss") is not None]
    tokens, values = (np.array([row[key] for row in trained], float) for key in ("tokens", "loss"))
    return tokens, _smooth(values)


def _held_out(
    rows: Sequence[Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[tuple[float, float]]]:
    """Points (tokens, loss) by domain; rows of evaluations have a step and no tokens."""
    at_step = {row["step"]: row["tokens"] for row in trained}
    last = [{"step": trained[-1]["step"], "eval": results}] if trained else []
    found: dict[str, list[tuple[float, float]]] = {}
    for row in [*rows, *last]:
        for domain, result in row.get("eval", {}).items():
            if row["step"] in at_step:
                found.setdefault(domain, []).append((at_step[row["step"]], result["loss"]))
    return found


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Name, first and last token of each stage."""
    found: list[tuple[str, float, float]] = []
    for row in rows:
        if not found or found[-1][0] != row["stage"]:
            begin = found[-1][2] if found else 0
            found.append((row["stage"], begin, row["tokens"]))
        found[-1] = (*found[-1][:2], row["tokens"])
    return found


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over windows that reach as far back as forward, shorter at both ends."""
    half = max(1, len(values) // _CURVE_POINTS)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), 4 * half)
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def controller(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, target: float) -> Figure:
    """Draws the router's top-p and the mean experts per token of runs, over tokens.

    Args:
      runs: by the name that the legend shows, rows of `metrics.jsonl`.
      target: `model.moe.target_experts`, a line.
    """
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, rows), color in zip(runs.items(), COLORS * len(runs), strict=False):
        steps = [row for row in rows if "top_p" in row]
        tokens = [row["tokens"] for row in steps]
        left.plot(tokens, [row["top_p"] for row in steps], color=color, label=name)
        used = [float(np.mean(row["mean_experts"])) for row in steps]
        right.plot(tokens, used, color=color)
    right.axhline(target, color=BLACK, ls="--", lw=1, label="target")
    left.set_title("top-p", fontsize=10)
    right.set_title("experts per token, mean over layers", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(frameon=False)
    return figure


def trade_off(scores: Mapping[float, TextScore], *, trained: float) -> Figure:
    """Draws bits per byte over experts per token of one checkpoint, as top-p moves.

    Args:
      scores: by top-p, of the same texts.
      trained: the top-p of the run, marked if it is among them.
    """
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    points = [(score.experts_per_token, score.bits_per_byte) for score in scores.values()]
    axes.plot(*zip(*points, strict=True), "o-", color=BLUE)
    for p, point in zip(scores, points, strict=True):
        axes.annotate(f"{p:.2g}", point, xytext=(4, 5), textcoords="offset points", fontsize=8)
        if p == trained:
            axes.plot(*point, "o", color=ORANGE, ms=10, label="as trained")
            axes.legend(frameon=False)
    axes.set(xlabel="experts per token", ylabel="bits per byte")
    axes.set_title("each point is a top-p", fontsize=10)
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    return figure
