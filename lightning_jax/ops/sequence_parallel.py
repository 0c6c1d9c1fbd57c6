"""Keys and values of earlier shards, where the positions of each row are split over devices.

Shard i of n has T consecutive positions of each row: queries, keys, values and segments. Its
queries also see keys of earlier shards. These are put in front of its own, so that the queries are
the last T of S keys (`Mask.query_offset`) and every attention kernel works as it is. In front of a
row there are keys of zeros in segment 0, padding, which every kernel hides.

Local layers take a halo: the last `window` - 1 keys before the shard, passed on from neighbour to
neighbour in ceil((window - 1) / T) hops. No message travels further than one hop, and the last one
carries only the rows that are still missing. Global layers gather all keys, n T of them.

The load of local layers is equal. That of global layers is equal in time and wasteful in FLOPs:
each shard computes (n - 1/2) T^2 pairs, of which shard i can see (i + 1/2) T^2. So all take as long
as the last one, which sees all of its pairs, and together they compute 2 - 1/n times the pairs that
a causal mask shows. A zigzag order (shard i holds the parts i and 2 n - 1 - i of 2 n; Llama 3,
arXiv 2407.21783, section 3.3.2) would compute no hidden pairs in about half the time; a ring (arXiv
2310.01889) would save memory alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax.ops.kv_cache import KV

Axis = str | tuple[str, ...]


def with_earlier_keys(
    kv: KV, segment_BT: jax.Array, *, window: int | None, axis: Axis
) -> tuple[KV, jax.Array]:
    """Puts the keys of earlier shards that a shard's queries may see in front of its own.

    Call it inside of `shard_map`. Differentiable: the gradients of keys and values go back to the
    shards that own them, where they are summed in the dtype of the keys.

    Args:
      kv: keys and values of this shard's T positions.
      segment_BT: int32, document of each position; 0 is padding.
      window: visible keys, self included; None for all.
      axis: mesh axis, or axes, over which the positions are split, in order.

    Returns:
      Keys and values with S - T more positions in front, and their segment_BS. S - T, the
      `query_offset` of the shard's queries, is min(window - 1, (n - 1) T).
    """
    T, shards = segment_BT.shape[1], lax.axis_size(axis)
    if window is not None and window < shards * T:
        rows = min(window - 1, (shards - 1) * T)
        return jax.tree.map(lambda x: _with_halo(x, axis, rows), (kv, segment_BT))
    kv, segment_BS = jax.tree.map(lambda x: _all_before(x, axis), (kv, segment_BT))
    # Later shards stand between the others, hidden. That makes distances longer, but no window here
    # is shorter than a row.
    shard_S = jnp.arange(shards * T) // T
    is_later_S = (shard_S >= lax.axis_index(axis)) & (shard_S < shards - 1)
    return kv, jnp.where(is_later_S[None], 0, segment_BS)


def _with_halo(x_BTX: jax.Array, axis: Axis, rows: int) -> jax.Array:
    """x_BTX after the last `rows` positions before it; zeros before the row."""
    to_next = [(i, i + 1) for i in range(lax.axis_size(axis) - 1)]
    parts = [x_BTX]
    while rows:
        size = min(rows, x_BTX.shape[1])
        parts.insert(0, lax.ppermute(parts[0][:, -size:], axis, to_next))
        rows -= size
    return jnp.concatenate(parts, axis=1)


def _all_before(x_BTX: jax.Array, axis: Axis) -> jax.Array:
    """All shards in their order, but this one in the place of the last, which no other needs."""
    all_BSX = lax.all_gather(x_BTX, axis, axis=1, tiled=True)
    start = all_BSX.shape[1] - x_BTX.shape[1]
    return lax.dynamic_update_slice_in_dim(all_BSX, x_BTX, start, axis=1)
