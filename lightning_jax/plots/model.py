"""Figures of a model: what its layers see and keep, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_jax import accounting
from lightning_jax.config import ModelConfig
from lightning_jax.config.pattern import LayerSpec
from lightning_jax.ops.mask import Mask
from lightning_jax.plots.common import BLACK, BLUE, COLORS, ORANGE

_PALE = {BLUE: "#BFDCEE", ORANGE: "#F9E7BF"}


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
    begin = [context - min(window, context)] if any(spec.is_local for spec in specs) else []
    axes.set_xticks([0, context // 2, *begin, context])
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


def costs(models: Mapping[str, ModelConfig], contexts: Sequence[int]) -> Figure:
    """Draws KV-cache bytes of one sequence, and attention FLOPs of its prefill, over its length.

    Args:
      models: by the name that the legend shows.
      contexts: lengths in tokens.
    """
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = {
        "KV cache of one sequence, bytes": accounting.kv_cache_bytes,
        "attention of its prefill, FLOPs": accounting.attention_flops,
    }
    for axes, (title, cost) in zip((left, right), panels.items(), strict=True):
        for (name, model), color in zip(models.items(), COLORS * len(models), strict=False):
            values = [cost(model, context) for context in contexts]
            axes.plot(contexts, values, "o-", color=color, label=name)
        axes.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    right.legend(frameon=False)
    return figure


def masks(shown: Mapping[str, Mask], length: int) -> Figure:
    """Draws which keys each of the last queries of a row sees, one panel per mask.

    Args:
      shown: by the title that the panel shows; the first row of a batch is drawn.
      length: keys; the queries are the last `length - query_offset` of them.
    """
    figure = Figure(figsize=(0.4 + 3.1 * len(shown), 3.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, mask) in zip(panels, shown.items(), strict=True):
        first = mask.query_offset
        seen_TS = np.asarray(mask.as_array(length - first, length)[0])
        edges = (-0.5, length - 0.5, length - 0.5, first - 0.5)
        axes.imshow(seen_TS, cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest", extent=edges)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="key", ylabel="query")
    return figure


def slots(position_TS: np.ndarray) -> Figure:
    """Draws the position that each slot of a cache holds after each token; negative: none.

    Args:
      position_TS: int `[T, S]`, one row per token (see `ops.kv_cache.slot_positions`).
    """
    T, S = position_TS.shape
    figure = Figure(figsize=(0.9 + 0.55 * S, 0.9 + 0.28 * T), layout="constrained")
    axes = figure.subplots()
    # How long ago: the newest is darkest.
    age_TS = position_TS.max(1, keepdims=True) - position_TS
    shade_TS = np.where(position_TS < 0, np.nan, 1 - 0.8 * age_TS / max(S - 1, 1))
    axes.imshow(shade_TS, aspect="auto", cmap="Blues", vmin=0, vmax=1.6)
    for (row, column), position in np.ndenumerate(position_TS):
        if position >= 0:
            axes.text(column, row, str(position), ha="center", va="center", fontsize=8)
    axes.set(xlabel="slot", ylabel="after token", title="position in each slot")
    axes.set_xticks(range(S))
    axes.set_yticks(range(T))
    return figure


def slopes(seconds: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draws times over lengths, both axes logarithmic, with the slope of each line.

    The slope is that of a least-squares line: 1 for a cost per token that stays, 2 for one that
    grows as the length does.

    Args:
      seconds: by the name that the legend shows, seconds by length in tokens.
    """
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, by_length), color in zip(seconds.items(), COLORS * len(seconds), strict=False):
        lengths, times = (np.array(list(x), float) for x in (by_length, by_length.values()))
        slope = np.polyfit(np.log(lengths), np.log(times), 1)[0]
        axes.plot(lengths, 1e3 * times, "o-", color=color, label=f"{name}: slope {slope:.2f}")
    axes.set(xlabel="tokens", ylabel="milliseconds", yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
