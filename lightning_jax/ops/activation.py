"""The gated unit of an MLP: how a gate and an up projection become hidden values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Slope of the sigmoid in the clamped form, which approximates GELU.
_CLAMPED_SLOPE = 1.702


def gated_unit(gate: jax.Array, up: jax.Array, *, clamp: float | None = None) -> jax.Array:
    """SwiGLU, `silu(gate) * up` (Shazeer, arXiv 2002.05202), or its clamped form.

    With `clamp` c: `g * sigmoid(1.702 g) * (u + 1)` with g = min(gate, c) and u = up cut to
    [-c, c] (OpenAI, "gpt-oss model card", arXiv 2508.10925, and its published code).

    Args:
      gate, up: float arrays of one shape, whose dtype the result has.
      clamp: c, above 0; None for SwiGLU.
    """
    if clamp is None:
        return gate * jax.nn.sigmoid(gate) * up
    gate = jnp.minimum(gate, clamp)
    up = jnp.clip(up, -clamp, clamp)
    return gate * jax.nn.sigmoid(_CLAMPED_SLOPE * gate) * (up + 1)
