"""Figures of the experts that the tokens of a text take."""

from __future__ import annotations

import html
import keyword
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_jax.infer.readings import TextRouting
from lightning_jax.plots.common import BLACK, BLUE, COLORS, ORANGE, name_pieces


def experts(routing: TextRouting) -> Figure:
    """Draws how many experts each token takes in each layer, and the mean over layers below."""
    count_RT, T = routing.count_RT, len(routing.pieces)
    figure = Figure(figsize=(min(14, 3 + 0.22 * T), 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    image = top.imshow(count_RT, aspect="auto", cmap="YlOrRd", vmin=0, interpolation="nearest")
    top.set_yticks(range(len(routing.layers)), [f"layer {index}" for index in routing.layers])
    figure.colorbar(image, ax=top, label="experts", ticks=range(int(count_RT.max()) + 1))
    bottom.bar(range(T), count_RT.mean(0), color=ORANGE)
    bottom.set(ylabel="mean", xlabel="" if T <= 80 else "token")
    if T <= 80:
        name_pieces(bottom.xaxis, routing.pieces)
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
        '<pre style="font-family:monospace;line-height:1.5;white-space:pre-wrap;color:#000;'
        'background:#fff">'
        f"{''.join(spans)}</pre><p>Experts per token: {' '.join(ends)}</p>"
    )


def _heat(share: float) -> str:
    """White to orange, light enough for black text."""
    return "#" + "".join(f"{round(255 + (end - 255) * share):02x}" for end in (245, 150, 60))


def expert_counts(routings: Sequence[TextRouting]) -> Figure:
    """Draws the share of texts' tokens by their number of experts, and the mean, in each layer."""
    count_RT = np.concatenate([routing.count_RT for routing in routings], axis=1)
    layers, R = routings[0].layers, len(count_RT)
    most = int(count_RT.max())
    share_RC = np.stack([np.bincount(row, minlength=most + 1)[1:] for row in count_RT])
    figure = Figure(figsize=(7.5, 1.2 + 0.34 * R), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        share_RC / count_RT.shape[1], aspect="auto", cmap="YlOrRd", vmin=0, interpolation="nearest"
    )
    axes.plot(count_RT.mean(1) - 1, range(R), "o", color=BLUE, label="mean")
    axes.set_yticks(range(R), [f"layer {index}" for index in layers])
    axes.set_xticks(range(most), [str(count) for count in range(1, most + 1)])
    axes.set(xlabel="experts of a token")
    figure.colorbar(image, ax=axes, label="share of the tokens")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def experts_by_domain(routings: Mapping[str, Sequence[TextRouting]]) -> Figure:
    """Draws the mean experts of a token in each layer, and over all layers, by domain.

    Args:
      routings: of some texts of each domain, by its name; all by the same model.
    """
    layers = next(iter(routings.values()))[0].layers
    whole = [TextRouting.joined(of_one) for of_one in routings.values()]
    mean_RS = np.stack([routing.count_RT.mean(1) for routing in whole], axis=1)
    mean_RS = np.concatenate([mean_RS, mean_RS.mean(0, keepdims=True)])
    rows, columns = mean_RS.shape
    figure = Figure(figsize=(2.2 + 1.1 * columns, 1.4 + 0.32 * rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(mean_RS, aspect="auto", cmap="YlOrRd", vmin=0, interpolation="nearest")
    for (row, column), mean in np.ndenumerate(mean_RS):
        is_dark = mean > 0.7 * mean_RS.max()
        color = "white" if is_dark else BLACK
        axes.text(column, row, f"{mean:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.axhline(rows - 1.5, color=BLACK, lw=1)
    axes.set_yticks(range(rows), [*(f"layer {index}" for index in layers), "all layers"])
    axes.set_xticks(range(columns), list(routings))
    figure.colorbar(image, ax=axes, label="experts of a token")
    return figure


def experts_by_position(routings: Mapping[str, Sequence[TextRouting]]) -> Figure:
    """Draws the mean experts of tokens, over layers, by their position in the text, by domain.

    Positions are taken together from 1, 2-3, 4-7, 8-15, ... on; the bands are a standard error on
    both sides.

    Args:
      routings: of some texts of each domain, by its name.
    """
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for (domain, of_one), color in zip(routings.items(), COLORS * len(routings), strict=False):
        mean_T = np.concatenate([routing.count_RT.mean(0) for routing in of_one])
        position_T = np.concatenate([np.arange(len(routing.pieces)) for routing in of_one])
        bin_T = np.log2(position_T + 1).astype(int)
        bins = np.unique(bin_T)
        means, errors = (
            np.array([value(mean_T[bin_T == index]) for index in bins])
            for value in (np.mean, lambda x: np.std(x) / len(x) ** 0.5)
        )
        axes.plot(2.0**bins, means, "o-", color=color, ms=4, label=domain)
        axes.fill_between(2.0**bins, means - errors, means + errors, color=color, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="position in the text, from 1", ylabel="experts per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def experts_by_kind(routings: Sequence[TextRouting]) -> Figure:
    """Draws the mean experts of tokens of Python code by what they are: names, digits ...

    The bars have the number of tokens; the whiskers are a standard error on both sides.
    """
    means: dict[str, list[float]] = {}
    for routing in routings:
        for kind, mean in zip(piece_kinds(routing.pieces), routing.count_RT.mean(0), strict=True):
            means.setdefault(kind, []).append(float(mean))
    kinds = sorted(means, key=lambda kind: np.mean(means[kind]))
    errors = [np.std(means[kind]) / len(means[kind]) ** 0.5 for kind in kinds]
    heights = [np.mean(means[kind]) for kind in kinds]
    figure = Figure(figsize=(6.5, 0.9 + 0.34 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(kinds)), heights, xerr=errors, color=ORANGE, ecolor=BLACK)
    axes.set_yticks(range(len(kinds)), [f"{kind} ({len(means[kind]):,})" for kind in kinds])
    axes.set(xlabel="experts per token")
    everything = np.mean([mean for found in means.values() for mean in found])
    axes.axvline(float(everything), color=BLACK, ls="--", lw=1)
    return figure


def piece_kinds(pieces: Sequence[str]) -> list[str]:
    """Returns what each token of Python code is, by its text and by the one before.

    "keyword", "name", "rest of a name" (it goes on with a word), "number", "punctuation",
    "white space", "line end" (with the indentation that follows it), or "other".
    """
    kinds, before = [], ""
    for piece in pieces:
        text, goes_on = piece.strip(), _in_word(piece[:1]) and _in_word(before[-1:])
        if not text:
            kind = "line end" if "\n" in piece else "white space" if piece else "other"
        elif text.isdigit():
            kind = "number"
        elif all(map(_in_word, text)):
            kind = "keyword" if text in keyword.kwlist else "name"
            kind = "rest of a name" if goes_on else kind
        else:
            kind = "other" if any(map(_in_word, text)) else "punctuation"
        kinds.append(kind)
        before = piece or before
    return kinds


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"
