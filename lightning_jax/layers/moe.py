"""Mixture of experts: float32 router, routed experts, shared experts."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.config import MoeConfig
from lightning_jax.layers.common import ZEROS, GatedMLP, Stacked, fan_in, output_scale, param
from lightning_jax.ops import balance
from lightning_jax.ops.experts import routed_experts
from lightning_jax.ops.projection import project
from lightning_jax.ops.routing import Choices, Routing, route


class MoE(nn.Module):
    """Fine-grained experts (arXiv 2401.06066); routing is top-k, top-p (arXiv 2403.07652) or dense.

    Returns the experts' output and the layer's `RoutingStats`, sums over the tokens of the whole
    batch: losses and metrics are functions of them. `top_p` is one value, or one per token [B, T].
    """

    config: MoeConfig
    num_layers: int
    train: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, token_mask_BT: jax.Array, bias_E: jax.Array, top_p: jax.Array
    ) -> tuple[jax.Array, balance.RoutingStats]:
        config = self.config
        routing = self._route(x_BTD, token_mask_BT, bias_E, top_p)
        stats = balance.routing_stats(
            routing,
            token_mask_BT,
            num_groups=config.num_groups,
            num_partitions=config.num_partitions,
        )
        out_BTD = self._experts(x_BTD, routing.choices)
        out_BTD *= jnp.asarray(config.routed_scale, out_BTD.dtype)
        if config.num_shared_experts:
            hidden = config.num_shared_experts * config.expert_dim
            clamp = config.clamp or None
            out_BTD += GatedMLP(hidden, self.num_layers, clamp, name="shared")(x_BTD)
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
        return route(
            logits_BTE,
            kind=kind,
            slots=config.slots(kind),
            score=config.router_score,
            top_p=top_p,
            bias_E=bias_E,
            renormalize=config.renormalize_gates,
            token_mask_M=token_mask_BT,
        )

    def _experts(self, x_BTD: jax.Array, choices: Choices) -> jax.Array:
        dim = x_BTD.shape[-1]
        weights, biases = self._weights(dim, x_BTD.dtype), self._biases(dim)
        unit, held = None, ("expert",)
        if isinstance(weights[0], Stacked):
            unit, held = weights[0].unit, ("layers", "expert")
            weights, biases = ([p.array_U for p in group] for group in (weights, biases))

        def local(x_BTD, choices, weights, biases, unit):
            flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
            y_MD = routed_experts(
                flat(x_BTD),
                jax.tree.map(flat, choices),
                *weights,
                biases=tuple(biases),
                clamp=self.config.clamp or None,
                unit=unit,
                implementation=self.config.implementation or None,
            )
            return y_MD.reshape(x_BTD.shape)

        # Sorting tokens by expert stays on the device that has them: experts come to the tokens.
        tokens = ("batch", "sequence")
        run = sharding.island(local, inputs=(tokens, tokens, held, held, ()), outputs=tokens)
        return run(x_BTD, choices, weights, biases, unit)

    def _weights(self, dim: int, dtype: jnp.dtype) -> list[jax.Array | Stacked]:
        count, hidden = self.config.num_experts, self.config.expert_dim
        inward, outward = fan_in(dim), fan_in(hidden, output_scale(self.num_layers))
        into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        return [
            param(self, "gate_EDF", inward, (count, dim, hidden), into, dtype),
            param(self, "up_EDF", inward, (count, dim, hidden), into, dtype),
            param(self, "down_EFD", outward, (count, hidden, dim), out, dtype),
        ]

    def _biases(self, dim: int) -> list[jax.Array | Stacked]:
        if not self.config.expert_bias:
            return []
        count, hidden = self.config.num_experts, self.config.expert_dim
        return [
            param(self, "gate_bias_EF", ZEROS, (count, hidden), ("expert", "mlp")),
            param(self, "up_bias_EF", ZEROS, (count, hidden), ("expert", "mlp")),
            param(self, "down_bias_ED", ZEROS, (count, dim), ("expert", "embed")),
        ]
