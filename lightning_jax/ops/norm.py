"""Root-mean-square normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Divides the last axis by its root mean square and multiplies by `scale`.

    Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.

    Args:
        x: any float array, at least one axis.
        scale: shape (x.shape[-1],); the multiplier itself, so 1 leaves the unit RMS.
        eps: added to the mean square.

    Returns:
        Same shape and dtype as `x`; computed in float32.

    Raises:
        ValueError: `scale` is not one number per entry of the last axis.
    """
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale has shape {scale.shape}: expected {x.shape[-1:]}, x's last axis")
    x_float = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_float), axis=-1, keepdims=True)
    scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (x_float * lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)
