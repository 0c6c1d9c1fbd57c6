"""Figures of where the tokens of a text look."""

from __future__ import annotations

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from lightning_jax.config.fields import require
from lightning_jax.infer.readings import TextAttention
from lightning_jax.plots.common import name_pieces

_MOST_LABELS = 48


def _shades() -> PowerNorm:
    """Colours follow the square root of a weight: weak ones can be seen beside a 1."""
    return PowerNorm(0.5, vmin=0, vmax=1)


def attention_map(attention: TextAttention, layer: int, head: int | None = None) -> Figure:
    """Draws the weight of each key (columns) for each query (rows) in one layer.

    Args:
      layer: its index in the model, one of `attention.layers`.
      head: a query head, from 0; None: the mean over heads.

    Raises:
      UserError: a layer that `attention` does not have, or no such head.
    """
    known, heads = attention.layers, attention.probs_LNTS.shape[1]
    require(layer in known, "layer", layer, f"one of {', '.join(map(str, known))}")
    probs_NTS = attention.probs_LNTS[known.index(layer)]
    require(head is None or 0 <= head < heads, "head", head, f"from 0 to {heads - 1}, or None")
    map_TS = probs_NTS.mean(0) if head is None else probs_NTS[head]
    T = len(attention.pieces)
    size = min(9, 2.5 + 0.18 * T)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(map_TS, cmap="Blues", norm=_shades(), interpolation="nearest")
    axes.set_title(f"layer {layer}, {'mean over heads' if head is None else f'head {head}'}")
    if T <= _MOST_LABELS:
        name_pieces(axes.xaxis, attention.pieces)
        name_pieces(axes.yaxis, attention.pieces, rotation=0)
    axes.set(xlabel="key", ylabel="query")
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight")
    return figure


def attention_heads(attention: TextAttention) -> Figure:
    """Draws the maps of all heads small: a row for each layer, a column for each head."""
    L, N = attention.probs_LNTS.shape[:2]
    figure = Figure(figsize=(0.8 + 1.3 * N, 0.5 + 1.35 * L), layout="constrained")
    panels = figure.subplots(L, N, squeeze=False)
    for row, layer in enumerate(attention.layers):
        for head, axes in enumerate(panels[row]):
            map_TS = attention.probs_LNTS[row, head]
            axes.imshow(map_TS, cmap="Blues", norm=_shades(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"head {head}", fontsize=9)
        panels[row, 0].set_ylabel(f"layer {layer}", fontsize=9)
    return figure
