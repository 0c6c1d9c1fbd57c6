"""Rows of a table of embeddings, whole or split by rows over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightning_jax.ops.collectives import total


def lookup(
    table_VD: jax.Array, tokens_BT: jax.Array, *, vocab_axes: tuple[str, ...] = ()
) -> jax.Array:
    """Returns `table_VD[tokens_BT]`, [B, T, D] in the table's dtype.

    Differentiable in reverse mode. The gradients of a row add up in at least float32: in bfloat16
    the sum of a frequent token's would stop growing at 256 of them.

    Args:
      table_VD: the table; with `vocab_axes` this device's rows of it.
      tokens_BT: int32 ids in [0, V), V the rows of all devices.
      vocab_axes: mesh axes whose devices have the same tokens and share the rows, in order. They
        all get the same result, exactly: the sum over devices has one term that is not zero.
    """
    if not vocab_axes:
        return _rows(table_VD, tokens_BT)
    rows = table_VD.shape[0]
    row_BT = tokens_BT - jax.lax.axis_index(vocab_axes) * rows
    is_here_BT = (row_BT >= 0) & (row_BT < rows)
    x_BTD = jnp.where(is_here_BT[..., None], _rows(table_VD, jnp.clip(row_BT, 0, rows - 1)), 0)
    return total(x_BTD, vocab_axes)


@jax.custom_vjp
def _rows(table_VD: jax.Array, row_BT: jax.Array) -> jax.Array:
    return table_VD[row_BT]


def _forward(table_VD, row_BT):
    # Kept of the table: its number of rows and its dtype.
    return table_VD[row_BT], (row_BT, jnp.zeros((len(table_VD), 0), table_VD.dtype))


def _backward(saved, dx_BTD):
    row_BT, like_V0 = saved
    wide = jnp.promote_types(like_V0.dtype, jnp.float32)
    dtable_VD = jnp.zeros((len(like_V0), dx_BTD.shape[-1]), wide)
    return dtable_VD.at[row_BT].add(dx_BTD.astype(wide)).astype(like_V0.dtype), None


_rows.defvjp(_forward, _backward)
