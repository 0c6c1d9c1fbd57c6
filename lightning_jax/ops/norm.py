"""Root-mean-square normalisation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Divides the last axis by its root mean square and multiplies by `scale`.

    Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.
    Differentiable in reverse mode, for which `x` and one number per row are kept.

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
    return _rms_norm(eps, x, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(eps, x, scale):
    return _forward(eps, x, scale)[0]


def _forward(eps, x, scale):
    x_float = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x_float), axis=-1, keepdims=True) + eps)
    return (x_float * inverse * _row(scale, x)).astype(x.dtype), (x, scale, inverse)


def _backward(eps, saved, dy):
    x, scale, inverse = saved
    unit, dy = x.astype(jnp.float32) * inverse, dy.astype(jnp.float32)
    dunit = dy * _row(scale, x)
    # The component of the gradient along a row only changes its length, which is divided out.
    dx = inverse * (dunit - unit * jnp.mean(dunit * unit, axis=-1, keepdims=True))
    dscale = jnp.sum(dy * unit, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


_rms_norm.defvjp(_forward, _backward)


def _row(scale, x):
    """The scale in float32, in a shape that broadcasts against `x`."""
    return jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
