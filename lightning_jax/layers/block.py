"""One layer (a letter of the pattern) and one unit (a repeat of it, the body of the scan)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.config import ModelConfig
from lightning_jax.config.pattern import GLOBAL, LOCAL, LayerSpec
from lightning_jax.layers.attention import Attention, KindContext, View
from lightning_jax.layers.common import GatedMLP, RMSNorm
from lightning_jax.layers.moe import MoE
from lightning_jax.ops.balance import RoutingStats
from lightning_jax.ops.kv_cache import Full, Ring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The values that all layers share in one forward pass."""

    kinds: dict[str, KindContext]
    token_mask_BT: jax.Array
    top_p: jax.Array
    keep_choices: bool = dataclasses.field(default=False, metadata={"static": True})


class Layer(nn.Module):
    """Pre-norm attention and MLP (dense or routed), each added to the residual stream."""

    config: ModelConfig
    spec: LayerSpec
    train: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        bias_E: jax.Array | None,
        view: View | None,
        cache: Ring | Full | None,
        unit: jax.Array,
    ) -> tuple[jax.Array, View, Ring | Full | None, RoutingStats | None]:
        """Returns (x_BTD, view of the keys attended to, updated cache, routing statistics)."""
        config, depth = self.config, self.config.num_layers
        attention = Attention(config.attention, self.spec, config.norm_eps, depth, name="attention")
        kind = context.kinds[LOCAL if self.spec.is_local else GLOBAL]
        with jax.named_scope("attention"):
            normed_BTD = RMSNorm(config.norm_eps, name="attention_norm")(x_BTD)
            out_BTD, view, cache = attention(normed_BTD, kind, view, cache, unit)
            x_BTD = sharding.shard(x_BTD + out_BTD, "batch", "sequence", None)
        stats = None
        with jax.named_scope("mlp"):
            normed_BTD = RMSNorm(config.norm_eps, name="mlp_norm")(x_BTD)
            if self.spec.routed:
                if bias_E is None:
                    raise ValueError("a routed layer needs the selection bias of its experts")
                moe = MoE(config.moe, depth, self.train, name="moe")
                out_BTD, stats = moe(
                    normed_BTD, context.token_mask_BT, bias_E, context.top_p, context.keep_choices
                )
            else:
                out_BTD = GatedMLP(config.mlp_dim, depth, name="mlp")(normed_BTD)
            x_BTD = sharding.shard(x_BTD + out_BTD, "batch", "sequence", None)
        return x_BTD, view, cache, stats


class Unit(nn.Module):
    """A run of layers closed under sharing: no key or value is borrowed from outside.

    `bias_RE` has a row for each of the R routed layers; `caches` maps the keys of owner layers to
    the caches of that layer in all units, of which this one is `unit`; empty without caches. The
    results include the updated caches, and routing statistics stacked on a leading R axis.
    """

    config: ModelConfig
    layers: tuple[LayerSpec, ...]
    train: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        bias_RE: jax.Array,
        caches: dict[str, Ring | Full],
        context: Context,
        unit: jax.Array,
    ) -> tuple[jax.Array, tuple[dict[str, Ring | Full], RoutingStats | None]]:
        views: dict[str, View] = {}
        written: dict[str, Ring | Full] = {}
        collected = []
        for spec in self.layers:
            bias_E = bias_RE[len(collected)] if spec.routed else None
            layer = Layer(self.config, spec, self.train, name=spec.key)
            x_BTD, views[spec.key], cache, stats = layer(
                x_BTD, context, bias_E, views.get(spec.owner), caches.get(spec.key), unit
            )
            if cache is not None:
                written[spec.key] = cache
            if stats is not None:
                collected.append(stats)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *collected) if collected else None
        return x_BTD, (written, stacked)
