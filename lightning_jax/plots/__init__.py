"""Figures of a model, a run, and what it does with a text: for notebooks, cards and pages.

Each function returns a matplotlib `Figure` that belongs to nobody else (pyplot keeps none), or
HTML. Notebooks show a figure that ends a cell after `%matplotlib inline`; `png` makes a file of it.
"""

from lightning_jax.pages import table
from lightning_jax.plots.attention import attention_heads, attention_map
from lightning_jax.plots.common import png
from lightning_jax.plots.model import costs, layers, masks, slopes, slots
from lightning_jax.plots.recall import grid as recall_grid
from lightning_jax.plots.routing import (
    expert_counts,
    expert_load,
    experts,
    experts_by_domain,
    experts_by_kind,
    experts_by_position,
    experts_in_text,
)
from lightning_jax.plots.training import controller, loss, losses, smooth_loss, trade_off

__all__ = [
    "attention_heads",
    "attention_map",
    "controller",
    "costs",
    "expert_counts",
    "expert_load",
    "experts",
    "experts_by_domain",
    "experts_by_kind",
    "experts_by_position",
    "experts_in_text",
    "layers",
    "loss",
    "losses",
    "masks",
    "png",
    "recall_grid",
    "slopes",
    "slots",
    "smooth_loss",
    "table",
    "trade_off",
]
