"""Key/value cache of one owner layer: a ring of `window` slots, or one slot a position.

A cache has two parts. `Slots` says which position of which segment every slot holds; it is the same
for all owners of a kind and is kept once. `KV` holds one owner's keys (already rotated) and values.
Layers that borrow have neither. Positions are indices in the row's stream and are always passed in,
never read from a cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lightning_jax.ops.mask import EMPTY_POSITION


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Contents of the slots: `position_BS` int32 (EMPTY_POSITION if free), `segment_BS` int32."""

    position_BS: jax.Array
    segment_BS: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys and values of one owner layer, by slot."""

    key_BSKH: jax.Array
    value_BSKH: jax.Array


def init_slots(batch: int, size: int) -> Slots:
    """Returns `size` free slots a row."""
    shape = (batch, size)
    return Slots(jnp.full(shape, EMPTY_POSITION, jnp.int32), jnp.zeros(shape, jnp.int32))


def init_kv(batch: int, size: int, kv_heads: int, head_dim: int, dtype: Any) -> KV:
    """Returns zeroed keys and values of `size` slots a row."""
    shape = (batch, size, kv_heads, head_dim)
    return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def slot_index(position_BT: jax.Array, segment_BT: jax.Array, size: int) -> jax.Array:
    """Returns the slot `position % size` that each new token is written to.

    Padding (segment 0) and tokens that later ones of the same chunk would overwrite get the index
    `size`, which `write` drops: every slot is then written at most once, whatever the chunk length.
    """
    valid_BT = segment_BT != 0
    last_B = jnp.max(jnp.where(valid_BT, position_BT, -1), axis=1)
    keep_BT = valid_BT & (position_BT > last_B[:, None] - size)
    return jnp.where(keep_BT, position_BT % size, size)


def write(buffers: Any, new: Any, slot_BT: jax.Array) -> Any:
    """Writes `new` (leaves `[B, T, ...]`) into `buffers` (`[B, S, ...]`) at `slot_BT`.

    Takes and returns a `Slots` or a `KV`; indices outside the buffer are dropped.
    """

    def write_row(buffer: jax.Array, row: jax.Array, slot_T: jax.Array) -> jax.Array:
        return buffer.at[slot_T].set(row.astype(buffer.dtype), mode="drop")

    return jax.tree.map(lambda b, n: jax.vmap(write_row)(b, n, slot_BT), buffers, new)


def append(buffers: Any, new: Any) -> Any:
    """Returns old slots followed by new tokens along the key axis, without writing them."""
    return jax.tree.map(lambda b, n: jnp.concatenate([b, n.astype(b.dtype)], axis=1), buffers, new)
