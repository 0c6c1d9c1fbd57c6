"""Figures of a model and a run, for notebooks, cards and the documentation.

Each function returns a matplotlib `Figure` that belongs to nobody else (pyplot keeps none), or
HTML. Notebooks show a figure that ends a cell after `%matplotlib inline`; `png` makes a file of it.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_jax import accounting
from lightning_jax.config import ModelConfig
from lightning_jax.config.pattern import LayerSpec
from lightning_jax.infer.run import TextRouting

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"
_PALE = {BLUE: "#BFDCEE", ORANGE: "#F9E7BF"}
_CURVE_POINTS = 200


def png(figure: Figure, *, dpi: int = 110) -> bytes:
    """Returns the picture as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def layers(model: ModelConfig, *, context: int | None = None) -> Figure:
    """Draws which keys each layer of a unit sees, and whose they are.

    One row per layer, from the first at the bottom; the strip is what the last of `context` tokens
    sees. Full colour: the layer owns its keys and values; pale, with an arrow: it borrows them.

    Args:
      context: tokens; default: four windows.
    """
    specs, window = model.unit_layers, model.attention.window
    context = 4 * window if context is None else context
    figure = Figure(figsize=(8.5, 0.9 + 0.42 * len(specs)), layout="constrained")
    axes = figure.subplots()
    rows = {spec.key: row for row, spec in enumerate(specs)}
    for row, spec in enumerate(specs):
        seen = min(window, context) if spec.is_local else context
        color = BLUE if spec.is_local else ORANGE
        face = color if spec.owns_kv else _PALE[color]
        axes.barh(row, context, color="#F2F2F2", height=0.7)
        axes.barh(row, seen, left=context - seen, color=face, edgecolor=color, height=0.7)
        axes.text(context * 1.015, row, _kept(spec, window, rows), va="center", fontsize=9)
        if not spec.owns_kv:
            ends = (context * 0.02, rows[spec.owner] + 0.36), (context * 0.02, row)
            axes.annotate("", *ends, arrowprops=dict(arrowstyle="<-", color=BLACK, lw=1.4))
    axes.set(xlim=(0, context * 1.36), xlabel="key position", ylim=(-0.6, len(specs) - 0.4))
    axes.set_xticks([0, context // 2, context - window, context])
    axes.set_yticks(range(len(specs)), [f"layer {row}  {s.letter}" for row, s in enumerate(specs)])
    repeats = f", {model.num_units} times" if model.num_units > 1 else ""
    axes.set_title(f"{model.unit}{repeats}: the keys that the last token sees", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, context)
    axes.tick_params(left=False)
    return figure


def _kept(spec: LayerSpec, window: int, rows: Mapping[str, int]) -> str:
    if not spec.owns_kv:
        return f"borrows from layer {rows[spec.owner]}"
    return f"keeps the last {window:,}" if spec.is_local else "keeps all"


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
    tokens = np.array([row["tokens"] for row in trained], float)
    values = np.array([row["loss"] for row in trained], float)
    axes.plot(tokens, values, color=BLUE, alpha=0.25, lw=1)
    axes.plot(tokens, _smooth(values), color=BLUE, lw=1.8, label="training")
    for number, (name, begin, end) in enumerate(_stages(trained)):
        axes.axvspan(begin, end, color="#000000" if number % 2 else "#FFFFFF", alpha=0.05, lw=0)
        axes.text((begin + end) / 2, 1.02, name, transform=axes.get_xaxis_transform(), ha="center")
    held_out = _held_out(rows, trained, results or {})
    for (domain, points), color in zip(held_out.items(), (ORANGE, GREEN, BLACK) * 9, strict=False):
        axes.plot(*zip(*points, strict=True), "o-", color=color, ms=4, label=f"held out: {domain}")
    axes.set(xlabel="tokens", ylabel="loss, nats per token")
    axes.margins(x=0)
    axes.legend(frameon=False)
    return figure


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


def costs(models: Mapping[str, ModelConfig], contexts: Sequence[int]) -> Figure:
    """Draws KV-cache bytes of one sequence, and attention FLOPs of its prefill, over its length.

    Args:
      models: by the name that the legend shows.
      contexts: lengths in tokens.
    """
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    panels = {
        "KV cache of one sequence, bytes": accounting.kv_cache_bytes,
        "attention of its prefill, FLOPs": accounting.attention_flops,
    }
    for axes, (title, cost) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, model in models.items():
            axes.plot(contexts, [cost(model, context) for context in contexts], "o-", label=name)
        axes.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def experts(routing: TextRouting) -> Figure:
    """Draws how many experts each token takes in each layer, and the mean over layers below."""
    count_RT, T = routing.count_RT, len(routing.pieces)
    figure = Figure(figsize=(min(14, 3 + 0.22 * T), 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    image = top.imshow(count_RT, aspect="auto", cmap="YlOrRd", vmin=0, interpolation="nearest")
    top.set_yticks(range(len(routing.layers)), [f"layer {index}" for index in routing.layers])
    figure.colorbar(image, ax=top, label="experts")
    bottom.bar(range(T), count_RT.mean(0), color=ORANGE)
    bottom.set(ylabel="mean", xlabel="" if T <= 80 else "token")
    if T <= 80:
        labels = [repr(piece)[1:-1] for piece in routing.pieces]
        bottom.set_xticks(range(T), labels, rotation=90, family="monospace", fontsize=8)
    return figure


def expert_load(routing: TextRouting) -> Figure:
    """Draws the share of the tokens that each expert of each layer takes."""
    share_RE = routing.load_RE / len(routing.pieces)
    figure = Figure(figsize=(8.5, 1.2 + 0.3 * len(routing.layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share_RE, aspect="auto", cmap="YlOrRd", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(routing.layers)), [f"layer {index}" for index in routing.layers])
    axes.set(xlabel="expert", title="share of the tokens")
    figure.colorbar(image, ax=axes)
    return figure


def experts_in_text(routing: TextRouting) -> str:
    """Returns HTML: the text, each token on a colour by its mean number of experts.

    Hovering shows the number. A legend with the range follows.
    """
    mean_T = routing.count_RT.mean(0)
    low, high = float(mean_T.min()), float(mean_T.max())
    spans = []
    for piece, mean in zip(routing.pieces, mean_T, strict=True):
        if piece:
            style = f"background:{_heat((mean - low) / max(high - low, 1e-9))}"
            shown = html.escape(piece)
            spans.append(f'<span style="{style}" title="{mean:.2f} experts">{shown}</span>')
    ends = [f'<span style="background:{_heat(x)}">&nbsp;{v:.1f}&nbsp;</span>' for x, v in
            ((0.0, low), (0.5, (low + high) / 2), (1.0, high))]  # fmt: skip
    return (
        '<pre style="line-height:1.5;white-space:pre-wrap;color:#000;background:#fff">'
        f"{''.join(spans)}</pre><p>Experts per token: {' '.join(ends)}</p>"
    )


def _heat(share: float) -> str:
    """White to orange, light enough for black text."""
    return "#" + "".join(f"{round(255 + (end - 255) * share):02x}" for end in (245, 150, 60))
