"""Mixture of experts: float32 router, routed experts, shared experts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.config import MoeConfig
from lightning_jax.layers.common import (
    TOKENS,
    ZEROS,
    GatedMLP,
    Stacked,
    fan_in,
    keep,
    output_scale,
    param,
    summed_in_float32,
)
from lightning_jax.ops import balance
from lightning_jax.ops.exchange import exchanged_experts
from lightning_jax.ops.projection import project
from lightning_jax.ops.routing import Choices, Routing, limit_capacity, route

_WEIGHTS = [("expert", "embed", "mlp"), ("expert", "embed", "mlp"), ("expert", "mlp", "embed")]
_BIASES = [("expert", "mlp"), ("expert", "mlp"), ("expert", "embed")]


class MoE(nn.Module):
    """Fine-grained experts (arXiv 2401.06066); routing is top-k, top-p (arXiv 2403.07652) or dense.

    Returns the experts' output and the layer's `RoutingStats`, sums over the tokens of the whole
    batch: losses and metrics are functions of them. `top_p` is one value, or one per token [B, T].
    With `keep_choices` the statistics have the choices of each token too.
    """

    config: MoeConfig
    num_layers: int
    train: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        token_mask_BT: jax.Array,
        bias_E: jax.Array,
        top_p: jax.Array,
        keep_choices: bool = False,
    ) -> tuple[jax.Array, balance.RoutingStats]:
        config = self.config
        routing = self._route(x_BTD, token_mask_BT, bias_E, top_p)
        keep(self, "probs_BTE", routing.scores.probs_ME)
        stats = balance.routing_stats(
            routing,
            token_mask_BT,
            num_groups=config.num_groups,
            num_partitions=config.num_partitions,
        )
        choices, dropped = self._limit(routing.choices)
        out_BTD, exchange = self._experts(x_BTD, choices)
        exchange = dataclasses.replace(exchange, empty=exchange.empty - dropped, dropped=dropped)
        kept = routing.choices if keep_choices else None
        stats = dataclasses.replace(stats, exchange=exchange, choices=kept)
        out_BTD *= jnp.asarray(config.routed_scale, out_BTD.dtype)
        if config.num_shared_experts:
            hidden = config.num_shared_experts * config.expert_dim
            clamp = config.clamp or None
            shared_BTD = GatedMLP(hidden, self.num_layers, clamp, name="shared")(x_BTD)
            if sharding.axes("expert"):
                # The sum alone would let a compiler put the shared experts after the exchange, as
                # part of the addition; finished apart, they run beside it.
                out_BTD, shared_BTD = jax.lax.optimization_barrier((out_BTD, shared_BTD))
            out_BTD += shared_BTD
        return out_BTD, stats

    def _route(
        self, x_BTD: jax.Array, token_mask_BT: jax.Array, bias_E: jax.Array, top_p: jax.Array
    ) -> Routing:
        config, dim = self.config, x_BTD.shape[-1]
        kind = config.train_routing if self.train else config.eval_routing
        router_DE = param(
            self, "router_DE", fan_in(dim), (dim, config.num_experts), ("embed", "router")
        )
        logits_BTE = project("BTD,DE->BTE", x_BTD.astype(jnp.float32), router_DE)
        if config.router_bias:
            shape = (config.num_experts,)
            logits_BTE += param(self, "router_bias_E", ZEROS, shape, ("router",))[None, None]

        def local(logits_BTE, token_mask_BT, bias_E, top_p):
            return route(
                logits_BTE,
                kind=kind,
                slots=config.slots(kind),
                score=config.router_score,
                top_p=top_p,
                bias_E=bias_E,
                renormalize=config.renormalize_gates,
                token_mask_M=token_mask_BT,
                num_groups=config.num_groups,
                max_groups=config.max_groups,
            )

        # A partitioner would gather the tokens of all devices to sort the scores of each.
        per_token = TOKENS if jnp.ndim(top_p) else ()
        inputs = TOKENS, TOKENS, (None,), per_token
        run = sharding.island(local, inputs=inputs, outputs=TOKENS)
        return run(logits_BTE, token_mask_BT, bias_E, top_p)

    def _limit(self, choices: Choices) -> tuple[Choices, jax.Array]:
        """Choices within the capacity of each expert, and how many were not."""
        factor, (T, C) = self.config.capacity_factor, choices.gate_MC.shape[-2:]
        if not (factor and self.train):
            return choices, jnp.float32(0)
        within = limit_capacity(choices, math.ceil(factor * T * C / choices.num_experts))
        return within, jnp.sum(choices.filled_MC & ~within.filled_MC, dtype=jnp.float32)

    def _experts(
        self, x_BTD: jax.Array, choices: Choices
    ) -> tuple[jax.Array, balance.ExchangeStats]:
        config, dim = self.config, x_BTD.shape[-1]
        parameters: Any = self._weights(dim, x_BTD.dtype), self._biases(dim)
        names, unit = (_WEIGHTS, _BIASES[: len(parameters[1])]), None
        if isinstance(parameters[0][0], Stacked):
            unit = parameters[0][0].unit
            parameters = tuple([p.array_U for p in group] for group in parameters)
            names = tuple([("layers", *axes) for axes in group] for group in names)
        else:
            parameters = summed_in_float32(parameters)

        # `vmap` initialises the units, for which jax has no ragged exchange; any other will do.
        transport = "all_gather" if self.is_initializing() else config.transport or None

        def local(x_BTD, choices, parameters, unit):
            flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
            weights, biases = parameters
            if unit is None:
                weights = [weight.astype(x_BTD.dtype) for weight in weights]
            y_MD, stats = exchanged_experts(
                flat(x_BTD),
                jax.tree.map(flat, choices),
                *weights,
                biases=tuple(biases),
                clamp=config.clamp or None,
                unit=unit,
                implementation=config.implementation or None,
                axis=next(iter(sharding.axes("expert")), None),
                sync_axes=sharding.axes("batch", "sequence", "mlp"),
                sum_axes=sharding.axes("mlp"),
                transport=transport,
                share=config.exchange_rows,
            )
            return y_MD.reshape(x_BTD.shape), jax.lax.psum(stats, sharding.axes(*TOKENS))

        # Sorting tokens by expert stays on the device that has them.
        run = sharding.island(local, inputs=(TOKENS, TOKENS, names, ()), outputs=(TOKENS, ()))
        return run(x_BTD, choices, parameters, unit)

    def _weights(self, dim: int, dtype: jnp.dtype) -> list[jax.Array | Stacked]:
        count, hidden = self.config.num_experts, self.config.expert_dim
        inward, outward = fan_in(dim), fan_in(hidden, output_scale(self.num_layers))
        gate, up, down = _WEIGHTS
        return [
            param(self, "gate_EDF", inward, (count, dim, hidden), gate, dtype),
            param(self, "up_EDF", inward, (count, dim, hidden), up, dtype),
            param(self, "down_EFD", outward, (count, hidden, dim), down, dtype),
        ]

    def _biases(self, dim: int) -> list[jax.Array | Stacked]:
        if not self.config.expert_bias:
            return []
        count, hidden = self.config.num_experts, self.config.expert_dim
        gate, up, down = _BIASES
        return [
            param(self, "gate_bias_EF", ZEROS, (count, hidden), gate),
            param(self, "up_bias_EF", ZEROS, (count, hidden), up),
            param(self, "down_bias_ED", ZEROS, (count, dim), down),
        ]
