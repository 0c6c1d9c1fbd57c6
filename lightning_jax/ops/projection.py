"""A product with a weight, in the dtype of its input."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightning_jax.ops.kernels.common import precision
from lightning_jax.ops.kernels.cpu import narrow

__all__ = ["operand", "precision", "project"]


def operand(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns x rounded to `dtype`, in the dtype that the target multiplies fastest."""
    return narrow.operand(x, dtype)


def project(
    equation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """An einsum in the dtype of `x` that accumulates in float32; `bias` fits the last axes.

    On a CPU a bfloat16 product with a bfloat16 result is 2-3 times slower than one with a float32
    result, and where the processor has no bfloat16 products at all, float32 is faster still.
    """
    operands = (narrow.operand(a, x.dtype) for a in (x, kernel))
    y = jnp.einsum(
        equation, *operands, precision=precision(x.dtype), preferred_element_type=jnp.float32
    )
    if bias is not None:
        y += bias[(None,) * (y.ndim - bias.ndim)]
    return y.astype(x.dtype)
