"""The units of a model: declared once, stacked on a leading axis U, and scanned over.

With caches, the scan carries them and each owner writes its unit's part in place; weights of
experts stay inside the stack until a block of tokens needs one of them. The same scan, with empty
caches, hands out what layers keep for an inspection.

Without caches, on an accelerator, equal layers that follow one another inside a unit (`LLL`) are
scanned too: the program holds one of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax import sharding
from lightning_jax.config import ModelConfig
from lightning_jax.config.pattern import LayerSpec
from lightning_jax.layers.attention import View
from lightning_jax.layers.block import Context, Layer, Unit
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

    Positions, segments and the router's p are given: no gradient reaches `context`. The backward
    pass recomputes layer by layer what `config.remat` says, so it holds the intermediate values of
    one layer at a time.
    """

    def body(context: Context, x_BTD: jax.Array, unit: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        return _forward_unit(config, train, context, x_BTD, *unit)

    context, stacks = jax.lax.stop_gradient(context), (params_U, bias_URE)
    is_bfloat16 = x_BTD.dtype == jnp.bfloat16
    if is_bfloat16 and config.scan and target.current().platform == "cpu":
        return narrow_scan.scan(body, context, x_BTD, stacks)
    unroll = 1 if config.scan else config.num_units
    return lax.scan(functools.partial(body, context), x_BTD, stacks, unroll=unroll)


def _forward_unit(
    config: ModelConfig,
    train: bool,
    context: Context,
    x_BTD: jax.Array,
    params: Any,
    bias_RE: jax.Array,
) -> tuple[jax.Array, RoutingStats | None]:
    """What a `Unit` computes without caches."""
    views: dict[str, View | None] = {}
    collected, routed = [], 0
    for run in _runs(config):
        first, last, end = run[0], run[-1], routed + len(run) * run[0].routed
        layer = _layer(config, train, first, context)
        biases_RE = bias_RE[routed:end] if first.routed else None
        view, routed = views.get(first.owner), end
        with jax.named_scope(first.key):
            if len(run) == 1:
                bias_E = None if biases_RE is None else biases_RE[0]
                x_BTD, views[last.key], stats = layer(params[last.key], x_BTD, bias_E, view)
                stats = jax.tree.map(lambda a: a[None], stats)
            else:
                is_lent = any(spec.owner == last.key != spec.key for spec in config.unit_layers)
                stacked = jax.tree.map(lambda *a: jnp.stack(a), *(params[spec.key] for spec in run))
                x_BTD, views[last.key], stats = _scan_run(
                    layer, stacked, x_BTD, biases_RE, view, is_lent
                )
        if stats is not None:
            collected.append(stats)
    stacked = jax.tree.map(lambda *a: jnp.concatenate(a), *collected) if collected else None
    return x_BTD, stacked


def _runs(config: ModelConfig) -> list[tuple[LayerSpec, ...]]:
    """The layers of a unit in order; those of a tuple are equal, and one loop computes them.

    On a CPU each is by itself: a loop would copy the parameters, and saves no time there.
    """
    alone = not config.scan or target.current().platform == "cpu"

    def kind(spec: LayerSpec) -> Any:
        return spec.key if alone else (spec.letter, spec.routed)

    return [tuple(run) for _, run in itertools.groupby(config.unit_layers, kind)]


def _layer(config: ModelConfig, train: bool, spec: LayerSpec, context: Context) -> Callable:
    """A layer as a function `(params, x_BTD, bias_E, view) -> (x_BTD, view, statistics)`."""
    module = Layer(config, spec, train)

    def layer(params: Any, x_BTD: jax.Array, bias_E: jax.Array | None, view: View | None) -> Any:
        arguments = x_BTD, context, bias_E, view, None, jnp.int32(0)
        found: Any = module.apply({"params": params}, *arguments)
        x_BTD, view, _, stats = found
        return x_BTD, view, stats

    if config.remat == "none":
        return layer
    policy = None if config.remat == "full" else getattr(jax.checkpoint_policies, config.remat)
    # prevent_cse: else XLA may recompute all layers of a unit before it needs the first of them.
    return jax.checkpoint(layer, policy=policy)


def _scan_run(
    layer: Callable,
    params_R: Any,
    x_BTD: jax.Array,
    biases_RE: jax.Array | None,
    view: View | None,
    is_lent: bool,
) -> tuple[jax.Array, View | None, RoutingStats | None]:
    """Applies R equal layers; returns also the last one's view, None unless it is lent.

    The stack is a copy of the run's parameters as they are stored, of one unit at a time.
    """

    def body(carry: tuple[jax.Array, View | None], given: tuple[Any, Any]) -> tuple[Any, Any]:
        x_BTD, own, stats = layer(given[0], carry[0], given[1], view)
        return (x_BTD, own if is_lent else None), stats

    stacks, own = (params_R, biases_RE), None
    if is_lent:
        one = jax.tree.map(lambda a: a[0], stacks)
        (_, shapes), _ = jax.eval_shape(body, (x_BTD, None), one)
        own = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    (x_BTD, own), stats = lax.scan(body, (x_BTD, own), stacks)
    return x_BTD, own, stats


def forward_with_caches(
    config: ModelConfig,
    params_U: Any,
    axes_U: Any,
    bias_URE: jax.Array,
    x_BTD: jax.Array,
    context: Context,
    caches: dict[str, Any],
    keep: Sequence[str] = (),
) -> tuple[jax.Array, dict[str, Any], RoutingStats | None, Any]:
    """Applies all units, each with its part of the caches.

    Args:
      axes_U: logical names of the parameters' axes.
      caches: of the owners; empty for a forward pass without any.
      keep: collections of values to hand out, of flax.

    Returns:
      (x_BTD, caches, routing statistics, the collections); the last two stacked on U.
    """
    module = Unit(config, config.unit_layers, train=False)

    def body(carry: tuple[jax.Array, dict[str, Any]], unit: jax.Array) -> tuple[Any, Any]:
        x_BTD, caches = carry
        params = _unit_params(params_U, axes_U, unit)
        (x_BTD, (caches, stats)), kept = module.apply(
            {"params": params}, x_BTD, bias_URE[unit], caches, context, unit, mutable=list(keep)
        )
        return (x_BTD, caches), (stats, kept)

    units = jnp.arange(config.num_units, dtype=jnp.int32)
    (x_BTD, caches), (stats, kept) = lax.scan(body, (x_BTD, caches), units)
    return x_BTD, caches, stats, kept


def _unit_params(params_U: Any, axes_U: Any, unit: jax.Array) -> Any:
    """The parameters of one unit; its experts stay in the stack unless they must be gathered."""
    in_place = sharding.lies_as_used("expert", "embed")

    def take(stack: jax.Array, axes: tuple[str, ...]) -> Any:
        return Stacked(stack, unit) if in_place and "expert" in axes else stack[unit]

    return jax.tree.map(take, params_U, axes_U)
