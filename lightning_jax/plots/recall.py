"""The figure of a recall task: exact matches by length and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_jax.plots.common import BLACK


def grid(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """Draws the share of exact matches of one task by length, and by depth where it has depths.

    A line stands where texts become longer than the window of local layers.

    Args:
      rows: the `cells` of a task, as `train.recall_evaluation.evaluate_recall` gives them; of
        several runs, their mean is drawn. A cell that none of them has is empty.
      title: above the figure.
    """
    lengths = sorted({(row["windows"], row["length"]) for row in rows})
    depths: list[float | None] = sorted({row["depth"] for row in rows if "depth" in row}) or [None]
    exact_DL = np.full((len(depths), len(lengths)), np.nan)
    for y, depth in enumerate(depths):
        for x, (windows, _) in enumerate(lengths):
            cell = [r["exact"] for r in rows if (r["windows"], r.get("depth")) == (windows, depth)]
            if cell:
                exact_DL[y, x] = np.mean(cell)
    figure = Figure(figsize=(2.4 + 0.75 * len(lengths), 1.5 + 0.45 * len(depths)), dpi=100)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    image = axes.imshow(exact_DL, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for (y, x), exact in np.ndenumerate(exact_DL):
        if np.isfinite(exact):
            color = BLACK if exact > 0.6 else "white"
            axes.text(x, y, f"{exact:.0%}", color=color, ha="center", va="center", fontsize=9)
    pairs = {row["windows"]: f"\n{row['pairs']} pairs" for row in rows if "pairs" in row}
    labels = [f"{length:,}{pairs.get(windows, '')}" for windows, length in lengths]
    axes.set_xticks(range(len(lengths)), labels)
    axes.set_xlabel("tokens of the text")
    if depths == [None]:
        axes.set_yticks([])
    else:
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_ylabel("depth")
    inside = sum(windows <= 1 for windows, _ in lengths)
    axes.axvline(inside - 0.5, color="#D55E00", lw=2.5)
    axes.annotate(
        "one window",
        (inside - 0.5, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="left" if inside == 0 else "center",
        color="#D55E00",
        fontsize=9,
    )
    figure.colorbar(image, ax=axes, label="exact matches", ticks=(0, 0.5, 1))
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
