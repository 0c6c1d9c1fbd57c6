"""Rotary position embedding, rotate-half convention.

Su et al., "RoFormer", arXiv:2104.09864, equation 34, with entry i paired with entry i + H/2
(not with its neighbour): the convention of most published checkpoints.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_table(
    positions_BT: jax.Array, head_dim: int, base: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines of position x base**(-2r/H), for `apply_rope`.

    Args:
        positions_BT: integer positions.
        head_dim: H, even.
        base: wavelength base, a number or a traced scalar.

    Returns:
        sin_BTR, cos_BTR, float32, R = H / 2.

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: rotary embedding pairs entries, use an even size")
    exponents_R = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies_R = jnp.asarray(base, jnp.float32) ** -exponents_R
    angles_BTR = positions_BT.astype(jnp.float32)[..., None] * frequencies_R[None, None]
    return jnp.sin(angles_BTR), jnp.cos(angles_BTR)


def apply_rope(x_BTNH: jax.Array, sin_BTR: jax.Array, cos_BTR: jax.Array) -> jax.Array:
    """Rotates each pair (i, i + H/2) of every head by its angle.

    Args:
        x_BTNH: queries or keys (N or K heads).
        sin_BTR: sines of `rope_table`; B may be 1.
        cos_BTR: cosines, likewise.

    Returns:
        Same shape and dtype as `x_BTNH`; computed in float32.

    Raises:
        ValueError: H is odd, or is not twice the table's size.
    """
    head_dim = x_BTNH.shape[-1]
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: rotary embedding pairs entries, use an even size")
    if sin_BTR.shape[-1] * 2 != head_dim:
        raise ValueError(
            f"rope table has {sin_BTR.shape[-1]} frequencies: head_dim={head_dim} "
            f"needs {head_dim // 2}"
        )
    sin_BT1R, cos_BT1R = sin_BTR[:, :, None], cos_BTR[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)
