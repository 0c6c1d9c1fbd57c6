"""Rows of a table of embeddings, whole or split by rows over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightning_jax.ops.collectives import total


def lookup(
    table_VD: jax.Array,
    tokens_BT: jax.Array,
    *,
    dtype: jnp.dtype,
    vocab_axes: tuple[str, ...] = (),
) -> jax.Array:
    """Returns `table_VD[tokens_BT]`, [B, T, D] in `dtype`.

    The gradients of the tokens of a row are added in the table's dtype.

    Args:
      table_VD: the table; with `vocab_axes` this device's rows of it.
      tokens_BT: int32 ids in [0, V), V the rows of all devices.
      vocab_axes: mesh axes whose devices have the same tokens and share the rows, in order. They
        all get the same result, exactly: the sum over devices has one term that is not zero.
    """
    if not vocab_axes:
        return table_VD[tokens_BT].astype(dtype)
    rows = table_VD.shape[0]
    row_BT = tokens_BT - jax.lax.axis_index(vocab_axes) * rows
    is_here_BT = (row_BT >= 0) & (row_BT < rows)
    x_BTD = jnp.where(is_here_BT[..., None], table_VD[jnp.clip(row_BT, 0, rows - 1)], 0)
    return total(x_BTD.astype(dtype), vocab_axes)
