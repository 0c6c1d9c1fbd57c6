"""All pictures of a sweep's report, each with what it shows."""

from __future__ import annotations

import dataclasses
import html
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_jax import plots
from lightning_jax.ablation.report import curves, figures
from lightning_jax.ablation.report.router import router_pictures
from lightning_jax.ablation.results import Run
from lightning_jax.ablation.sweep import Sweep
from lightning_jax.config.errors import UserError

logger = logging.getLogger(__name__)

_DPI = 150
_INTERVALS = (
    "Mean difference of each arm to the baseline of the same seed, with the interval that its "
    "verdict is read from: all of them hold together with 95%. Small dots are seeds. An interval "
    "inside the grey margin says equivalent; else one that excludes zero says better or worse."
)
_TRADES = {
    "kv": "Quality against the KV cache.",
    "flops": "Quality against the training FLOPs spent.",
    "params": "Quality against the parameters that a token uses.",
    "decode": "Quality against measured decoding speed.",
}
_GAIN = (
    "The baseline trained with several budgets, the fit, and the arms; dotted: to the budget at "
    "which the baseline has the arm's loss."
)
_LEARNING = (
    "Top: training loss, mean over seeds. Below: the loss minus the baseline's of the same seed. "
    "Bands are the range over seeds."
)
_ROUTERS = {
    "experts_by_layer": "Share of tokens by their number of experts, and the mean, in each layer.",
    "experts_by_domain": "Mean number of experts by layer and domain.",
    "experts_by_position": "Mean number of experts by position in the text.",
    "expert_load": "Share of tokens that take each expert.",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
      name: of its file, `report_<name>.png`.
      section: of the page: `quality`, `cost`, `gain`, `learning`, `recall`, or `router` and an arm.
      caption: what it shows.
      png: the file's content.
    """

    name: str
    section: str
    caption: str
    png: bytes


def draw(report: Mapping[str, Any], root: Path) -> list[Picture]:
    """Draws quality, costs, gain, learning curves and recall, as far as the report has them.

    Args:
      report: result of `summary.summarize`.
      root: the sweep's folder.
    """
    finished = [Run(arm["arm"], seed) for arm in report["arms"] for seed in arm["seeds"]]
    learned = figures.learning(report, curves.curves(finished, root))
    drawn: list[tuple[str, str, str, Figure | None]] = [
        ("intervals", "quality", _INTERVALS, figures.intervals(report)),
        *(
            (f"trade_{name}", "cost", _TRADES[name], figure)
            for name, figure in figures.trades(report).items()
        ),
        ("gain", "gain", _GAIN, figures.gains(report)),
        ("learning", "learning", _LEARNING, learned),
    ]
    for domain, task in report["recall"].items():
        for arm, cells in task["grids"].items():
            figure = plots.recall_grid(cells, title=f"{arm}: {domain}")
            caption = f"Exact matches of {arm} on {domain}, mean over seeds."
            drawn.append((f"recall_{domain}_{arm}", "recall", caption, figure))
    return [
        Picture(name, section, caption, _png(figure))
        for name, section, caption, figure in drawn
        if figure is not None
    ]


def draw_routers(
    report: Mapping[str, Any], sweep: Sweep, root: Path
) -> tuple[list[Picture], dict[str, str]]:
    """Draws the routers of the arms with experts, each by its first seed that has finished.

    Returns:
      (pictures, HTML by arm): a text whose tokens are coloured by their number of experts, or why
      the run cannot be read.
    """
    pictures, texts = [], {}
    for arm in report["arms"]:
        name, seeds = arm["arm"], arm["seeds"]
        if not seeds or not sweep.config(Run(name, seeds[0])).model.moe.num_experts:
            continue
        run = Run(name, seeds[0])
        logger.info("router of %s", run)
        try:
            drawn, texts[name] = router_pictures(run.folder(root))
        except UserError as error:
            logger.warning("router of %s: %s", run, error)
            texts[name] = f"<p>{html.escape(f'Not shown: {error}')}</p>"
            continue
        pictures += [
            Picture(f"router_{name}_{kind}", f"router {name}", _ROUTERS[kind], _png(figure))
            for kind, figure in drawn.items()
        ]
    return pictures, texts


def _png(figure: Figure) -> bytes:
    """A PNG as wide as the others, so that its letters can be read on a phone."""
    height = figure.get_figheight() * max(1.0, figures.WIDTH / figure.get_figwidth())
    figure.set_size_inches(figures.WIDTH, height)
    return plots.png(figure, dpi=_DPI)
