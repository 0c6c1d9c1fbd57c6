"""Mixture of experts: float32 router, routed experts, shared experts."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.config import MoeConfig
from lightning_jax.layers.common import ZEROS, GatedMLP, fan_in, output_scale, param
from lightning_jax.ops import balance, routing
from lightning_jax.ops.experts import routed_experts


class MoE(nn.Module):
    """Fine-grained experts (arXiv 2401.06066); routing is top-k, top-p (arXiv 2403.07652) or dense.

    Returns the experts' output and the layer's `RoutingStats`, sums over the tokens of the whole
    batch: losses and metrics are functions of them.
    """

    config: MoeConfig
    num_layers: int
    train: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, token_mask_BT: jax.Array, bias_E: jax.Array, top_p: jax.Array
    ) -> tuple[jax.Array, balance.RoutingStats]:
        config = self.config
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routed = self._route(x_MD, token_mask_BT.reshape(-1), bias_E, top_p)
        stats = balance.routing_stats(
            routed,
            token_mask_BT.reshape(-1),
            num_groups=config.num_groups,
            num_partitions=config.num_partitions,
        )
        y_MD = self._experts(x_MD, routed) * jnp.asarray(config.routed_scale, x_MD.dtype)
        out_BTD = y_MD.reshape(x_BTD.shape)
        if config.num_shared_experts:
            hidden = config.num_shared_experts * config.expert_dim
            clamp = config.clamp or None
            out_BTD += GatedMLP(hidden, self.num_layers, clamp, name="shared")(x_BTD)
        return out_BTD, stats

    def _route(
        self, x_MD: jax.Array, token_mask_M: jax.Array, bias_E: jax.Array, top_p: jax.Array
    ) -> routing.Routing:
        config, dim = self.config, x_MD.shape[-1]
        kind = config.train_routing if self.train else config.eval_routing
        router_DE = param(
            self, "router_DE", fan_in(dim), (dim, config.num_experts), ("embed", "router")
        )
        logits_ME = jnp.einsum("MD,DE->ME", x_MD.astype(jnp.float32), router_DE)
        if config.router_bias:
            shape = (config.num_experts,)
            logits_ME += param(self, "router_bias_E", ZEROS, shape, ("router",))[None]
        return routing.route(
            logits_ME,
            kind=kind,
            slots=config.slots(kind),
            score=config.router_score,
            top_p=top_p,
            bias_E=bias_E,
            renormalize=config.renormalize_gates,
            token_mask_M=token_mask_M,
        )

    def _experts(self, x_MD: jax.Array, routed: routing.Routing) -> jax.Array:
        config, dim, dtype = self.config, x_MD.shape[-1], x_MD.dtype
        count, hidden = config.num_experts, config.expert_dim
        inward, outward = fan_in(dim), fan_in(hidden, output_scale(self.num_layers))
        axes = ("expert", "embed", "mlp")
        gate_EDF = param(self, "gate_EDF", inward, (count, dim, hidden), axes, dtype)
        up_EDF = param(self, "up_EDF", inward, (count, dim, hidden), axes, dtype)
        down_EFD = param(
            self, "down_EFD", outward, (count, hidden, dim), ("expert", "mlp", "embed"), dtype
        )

        def local(x_MD, routed, weights, biases):
            return routed_experts(
                x_MD,
                routed,
                *weights,
                biases=biases,
                clamp=config.clamp or None,
                implementation=config.implementation or None,
            )

        # Sorting tokens by expert stays on the device that has them: experts come to the tokens.
        tokens, whole = ("batch",), ("expert",)
        run = sharding.island(local, inputs=(tokens, tokens, whole, whole), outputs=tokens)
        return run(x_MD, routed, (gate_EDF, up_EDF, down_EFD), self._biases(dim))

    def _biases(self, dim: int) -> tuple[jax.Array, ...]:
        if not self.config.expert_bias:
            return ()
        count, hidden = self.config.num_experts, self.config.expert_dim
        return (
            param(self, "gate_bias_EF", ZEROS, (count, hidden), ("expert", "mlp")),
            param(self, "up_bias_EF", ZEROS, (count, hidden), ("expert", "mlp")),
            param(self, "down_bias_ED", ZEROS, (count, dim), ("expert", "embed")),
        )
