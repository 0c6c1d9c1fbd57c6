"""Rotary position embedding, rotate-half convention, and its stretched forms for long contexts.

Su et al., "RoFormer", arXiv:2104.09864, equation 34, with entry i paired with entry i + H/2
(not with its neighbour): the convention of most published checkpoints. R = H / 2 pairs; pair r
turns by `frequency_R[r]` radians per position.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def frequencies(head_dim: int, base: float | jax.Array) -> jax.Array:
    """Returns base**(-2r/H) as float32 frequency_R; `base` may be a traced scalar.

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: rotary embedding pairs entries, use an even size")
    exponents_R = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return jnp.asarray(base, jnp.float32) ** -exponents_R


def stretch_llama3(
    frequency_R: jax.Array,
    *,
    factor: float,
    original_length: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> jax.Array:
    """Divides low frequencies by `factor`, keeps high ones, and blends linearly between.

    Low: fewer than `low_freq_factor` turns in `original_length` positions; high: more than
    `high_freq_factor` (the Llama 3.1 models, arXiv 2407.21783, and their published code).
    """
    turns_R = original_length * frequency_R / (2 * math.pi)
    kept_R = (turns_R - low_freq_factor) / (high_freq_factor - low_freq_factor)
    kept_R = jnp.clip(kept_R, 0.0, 1.0)
    return kept_R * frequency_R + (1 - kept_R) * frequency_R / factor


def stretch_yarn(
    frequency_R: jax.Array,
    base: float | jax.Array,
    *,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> jax.Array:
    """Divides low frequencies by `factor`, keeps high ones, with a ramp over pairs between.

    YaRN, arXiv 2309.00071, section 3.2 ("NTK-by-parts"): the ramp runs from the pair that makes
    `beta_fast` turns in `original_length` positions to the one that makes `beta_slow`; `truncate`
    rounds both outwards to whole pairs. Its temperature is left to the caller: multiply sines and
    cosines by the attention factor (`yarn_attention_factor`).
    """
    pairs = frequency_R.shape[-1]
    log_base = jnp.log(jnp.asarray(base, jnp.float32))

    def pair_with(turns: float) -> jax.Array:
        return pairs * math.log(original_length / (turns * 2 * math.pi)) / log_base

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = jnp.floor(low), jnp.ceil(high)
    low, high = jnp.maximum(low, 0.0), jnp.minimum(high, 2.0 * pairs - 1)
    width = jnp.where(high == low, 0.001, high - low)
    stretched_R = jnp.clip((jnp.arange(pairs, dtype=jnp.float32) - low) / width, 0.0, 1.0)
    return stretched_R * frequency_R / factor + (1 - stretched_R) * frequency_R


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """Returns 0.1 * weight * ln(factor) + 1 (YaRN, arXiv 2309.00071, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0


def rope_table(positions_BT: jax.Array, frequency_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines of position x frequency, for `apply_rope`.

    Args:
        positions_BT: integer positions.
        frequency_R: radians per position, of `frequencies` or one of its stretched forms.

    Returns:
        sin_BTR, cos_BTR, float32.
    """
    angles_BTR = positions_BT.astype(jnp.float32)[..., None] * frequency_R[None, None]
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
