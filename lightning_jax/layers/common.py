"""What every layer uses: named parameters, projections, RMSNorm and the gated MLP.

Initialisation, in one place:

| parameter | distribution |
|---|---|
| embedding, head | normal, std D^-0.5 |
| query, key, value, gate, up, router | truncated normal, std fan_in^-0.5 |
| attention output, down | truncated normal, std fan_in^-0.5 (2 x layers)^-0.5 |
| norm scales | ones |
| attention sinks, head gates | zeros |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.ops import norm

Initializer = Callable[..., jax.Array]


def scaled_normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Truncated normal of standard deviation `scale * fan_in ** -0.5`."""
    return jax.nn.initializers.truncated_normal(stddev=scale * fan_in**-0.5)


def output_scale(num_layers: int) -> float:
    """Keeps the residual stream's variance at depth: two additions a layer (GPT-2)."""
    return (2 * num_layers) ** -0.5


def param(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Declares a float32 parameter with one logical name an axis; returns it ready for use.

    Ready means gathered from its FSDP shards and cast to `dtype`.
    """
    stored = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    # Cast before the gather: half the bytes travel when computing in bfloat16.
    return sharding.in_use(stored.astype(dtype), *axes)


def project(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """An einsum in the dtype of `x` that accumulates in float32.

    On CPU a bfloat16 dot with a bfloat16 result is 2-3 times slower than one with a float32 result.
    """
    return jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale (arXiv 1910.07467)."""

    eps: float
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", nn.initializers.ones, (x.shape[-1],), (self.axis,))
        return norm.rms_norm(x, scale, eps=self.eps)


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): `(silu(x gate) * (x up)) down`."""

    hidden_dim: int
    num_layers: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dim, hidden, dtype = x_BTD.shape[-1], self.hidden_dim, x_BTD.dtype
        inward, outward = scaled_normal(dim), scaled_normal(hidden, output_scale(self.num_layers))
        gate_DF = param(self, "gate_DF", inward, (dim, hidden), ("embed", "mlp"), dtype)
        up_DF = param(self, "up_DF", inward, (dim, hidden), ("embed", "mlp"), dtype)
        down_FD = param(self, "down_FD", outward, (hidden, dim), ("mlp", "embed"), dtype)
        hidden_BTF = nn.silu(project("BTD,DF->BTF", x_BTD, gate_DF))
        hidden_BTF *= project("BTD,DF->BTF", x_BTD, up_DF)
        return project("BTF,FD->BTD", hidden_BTF, down_FD)


def embedding_init(dim: int) -> Initializer:
    """Normal of standard deviation D^-0.5: logits of a tied head start near unit scale."""
    return jax.nn.initializers.normal(stddev=1 / math.sqrt(dim))
