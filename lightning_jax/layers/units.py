"""The units of a model: declared once, stacked on a leading axis U, and scanned over.

With caches, the scan carries them and each owner writes its unit's part in place; weights of
experts stay inside the stack until a block of tokens needs one of them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax import sharding
from lightning_jax.config import ModelConfig
from lightning_jax.layers.block import Context, Unit
from lightning_jax.layers.common import Declared, Stacked
from lightning_jax.ops import narrow_scan
from lightning_jax.ops.balance import RoutingStats
from lightning_jax.runtime import target


def declare(config: ModelConfig, key: jax.Array, x_BTD: jax.Array, context: Context) -> Any:
    """Initialises all units; returns their boxed parameters with the axis `layers` in front."""
    unit = Unit(config, config.unit_layers, train=False)
    routed = sum(spec.routed for spec in config.unit_layers)
    no_bias_RE = jnp.zeros((routed, config.moe.num_experts), jnp.float32)
    arguments = x_BTD, no_bias_RE, {}, context, jnp.int32(0)
    boxed = jax.vmap(lambda key: unit.init(key, *arguments)["params"])(
        jax.random.split(key, config.num_units)
    )
    return jax.tree.map(
        lambda box: box.replace(names=("layers", *box.names)),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, Declared),
    )


def forward(
    config: ModelConfig,
    params_U: Any,
    bias_URE: jax.Array,
    x_BTD: jax.Array,
    context: Context,
    *,
    train: bool,
) -> tuple[jax.Array, RoutingStats | None]:
    """Applies all units without caches; returns (x_BTD, routing statistics stacked on U).

    Positions, segments and the router's p are given: no gradient reaches `context`.
    """
    module = Unit(config, config.unit_layers, train)

    def body(context: Context, x_BTD: jax.Array, unit: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        params, bias_RE = unit
        first = jnp.int32(0)
        x_BTD, (_, stats) = module.apply({"params": params}, x_BTD, bias_RE, {}, context, first)
        return x_BTD, stats

    if config.remat != "none":
        policy = None if config.remat == "full" else getattr(jax.checkpoint_policies, config.remat)
        body = jax.checkpoint(body, policy=policy, prevent_cse=not config.scan)
    context, stacks = jax.lax.stop_gradient(context), (params_U, bias_URE)
    is_bfloat16 = x_BTD.dtype == jnp.bfloat16
    if is_bfloat16 and config.scan and target.current().platform == "cpu":
        return narrow_scan.scan(body, context, x_BTD, stacks)
    unroll = 1 if config.scan else config.num_units
    return lax.scan(functools.partial(body, context), x_BTD, stacks, unroll=unroll)


def forward_with_caches(
    config: ModelConfig,
    params_U: Any,
    axes_U: Any,
    bias_URE: jax.Array,
    x_BTD: jax.Array,
    context: Context,
    caches: dict[str, Any],
) -> tuple[jax.Array, dict[str, Any], RoutingStats | None]:
    """Applies all units, each with its part of the caches; returns (x_BTD, caches, statistics).

    `axes_U` are the logical names of the parameters' axes.
    """
    module = Unit(config, config.unit_layers, train=False)

    def body(carry: tuple[jax.Array, dict[str, Any]], unit: jax.Array) -> tuple[Any, Any]:
        x_BTD, caches = carry
        params = _unit_params(params_U, axes_U, unit)
        x_BTD, (caches, stats) = module.apply(
            {"params": params}, x_BTD, bias_URE[unit], caches, context, unit
        )
        return (x_BTD, caches), stats

    units = jnp.arange(config.num_units, dtype=jnp.int32)
    (x_BTD, caches), stats = lax.scan(body, (x_BTD, caches), units)
    return x_BTD, caches, stats


def _unit_params(params_U: Any, axes_U: Any, unit: jax.Array) -> Any:
    """The parameters of one unit; its experts stay in the stack unless they must be gathered."""
    in_place = sharding.lies_as_used("expert", "embed")

    def take(stack: jax.Array, axes: tuple[str, ...]) -> Any:
        return Stacked(stack, unit) if in_place and "expert" in axes else stack[unit]

    return jax.tree.map(take, params_U, axes_U)
