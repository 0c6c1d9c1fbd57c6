"""Key/value caches of owner layers: `Full` has a slot per position, `Ring` the last `window` ones.

Either way position p lies in slot p % S, so the position that a slot holds follows from the last
position of its row (`slot_positions`) and is never stored. The document of a slot's token is the
same for all owners of a kind: those segments are kept once, beside the caches (`Chunk`). Keys are
cached after rotation. Layers that borrow keys and values have no cache and attend to the view of
their owner.

Arrays hold the caches of U units, so that a scan over units carries them and writes in place; a
layer outside of the scan has U = 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax.ops.kernels.cpu import narrow
from lightning_jax.ops.mask import Mask
from lightning_jax.runtime import target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys and values of one owner layer."""

    key_BSKH: jax.Array
    value_BSKH: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fresh:
    """A view of keys at hand: those of this forward pass, after the content of a ring if any."""

    kv: KV
    mask: Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens that a forward pass appends to the caches of a kind.

    Attributes:
      start_B: int32, position of each row's first token; the others follow it.
      segment_BT: int32, document of each token; 0 is padding, which takes a position but is
        neither cached nor seen.
      before_BS: int32, document of each slot's token before the chunk; 0 for none.
      after_BS: int32, document of each slot's token after the chunk.
    """

    start_B: jax.Array
    segment_BT: jax.Array
    before_BS: jax.Array
    after_BS: jax.Array

    @classmethod
    def append(cls, start_B: jax.Array, segment_BT: jax.Array, before_BS: jax.Array) -> Chunk:
        """Returns the chunk, with the segments of the slots after it is written."""
        chunk = cls(start_B, segment_BT, before_BS, before_BS)
        size, position_BT = before_BS.shape[1], chunk.position_BT
        # A token that a later one of the chunk overwrites is dropped, so no slot is written twice.
        keep_BT = (segment_BT != 0) & (position_BT > chunk.last_B[:, None] - size)
        slot_BT = jnp.where(keep_BT, position_BT % size, size)
        write = jax.vmap(lambda row_S, slot_T, new_T: row_S.at[slot_T].set(new_T, mode="drop"))
        return dataclasses.replace(chunk, after_BS=write(before_BS, slot_BT, segment_BT))

    @property
    def position_BT(self) -> jax.Array:
        """Positions in the row's stream."""
        return self.start_B[:, None] + jnp.arange(self.segment_BT.shape[1], dtype=jnp.int32)[None]

    @property
    def last_B(self) -> jax.Array:
        """The last cached position after the chunk is written; -1 in an empty row."""
        written_BT = jnp.where(self.segment_BT != 0, self.position_BT, -1)
        return jnp.maximum(self.start_B - 1, jnp.max(written_BT, axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A view of a cache that holds the queries' own keys too: unit `unit` of `cache`."""

    cache: Ring | Full
    unit: jax.Array
    chunk: Chunk
    window: int | None = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Cache:
    """Stored keys and values; bfloat16 as its bits on a CPU, where a loop writes them in place."""

    key_UBSKH: jax.Array
    value_UBSKH: jax.Array
    dtype: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(
        cls, units: int, batch: int, size: int, kv_heads: int, head_dim: int, dtype: Any
    ) -> Any:
        """Returns zeroed caches of `size` slots per row for `units` layers."""
        dtype = jnp.dtype(dtype)
        is_bits = dtype == jnp.bfloat16 and target.current().platform == "cpu"
        shape = (units, batch, size, kv_heads, head_dim)
        zeros = (jnp.zeros(shape, jnp.uint16 if is_bits else dtype) for _ in range(2))
        return cls(*zeros, dtype=dtype.name)

    @property
    def size(self) -> int:
        """Slots per row."""
        return self.key_UBSKH.shape[2]

    def read(self, unit: jax.Array) -> KV:
        """Returns all slots of a unit."""
        kv = KV(*(lax.dynamic_index_in_dim(x, unit, keepdims=False) for x in self._arrays))
        return jax.tree.map(lambda x: narrow.from_bits(x, jnp.dtype(self.dtype)), kv)

    @property
    def _arrays(self) -> tuple[jax.Array, jax.Array]:
        return self.key_UBSKH, self.value_UBSKH

    def _put(self, fresh: KV, write: Any) -> Any:
        """Returns the cache after `write(stored, fresh)` of keys and values, fresh as stored."""
        rows = [x.astype(self.dtype) for x in (fresh.key_BSKH, fresh.value_BSKH)]
        if self.key_UBSKH.dtype == jnp.uint16:
            rows = [narrow.to_bits(x) for x in rows]
        key, value = (write(x, new) for x, new in zip(self._arrays, rows, strict=True))
        return dataclasses.replace(self, key_UBSKH=key, value_UBSKH=value)

    def _put_token(self, fresh: KV, unit: jax.Array, chunk: Chunk) -> Any:
        """Writes chunks of one token each; padding is dropped."""
        slot_B = jnp.where(chunk.segment_BT[:, 0] != 0, chunk.start_B % self.size, self.size)
        return self._put(fresh, lambda x, new: _scatter(x, new, unit, slot_B))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full(_Cache):
    """A slot for each position up to the size."""

    def update(self, fresh: KV, unit: jax.Array, chunk: Chunk, window: int | None) -> Any:
        """Appends a chunk to a unit's cache; returns (cache, view of it for the chunk's queries).

        A row's tokens must fit; padding after them need not.
        """
        if chunk.segment_BT.shape[1] == 1:
            cache = self._put_token(fresh, unit, chunk)
        else:
            cache = self._put(fresh, lambda x, new: _merge(x, new, unit, chunk))
        return cache, Stored(cache, unit, chunk, window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring(_Cache):
    """Slots for the last `size` positions: what a sliding window of that length sees."""

    def update(self, fresh: KV, unit: jax.Array, chunk: Chunk, window: int | None) -> Any:
        """Appends a chunk to a unit's ring; returns (ring, view for the chunk's queries).

        One token attends to the written ring. The queries of a longer chunk still see keys that the
        chunk overwrites, so they attend to the old ring, in order of age, followed by the chunk.
        """
        if chunk.segment_BT.shape[1] == 1:
            cache = self._put_token(fresh, unit, chunk)
            return cache, Stored(cache, unit, chunk, window)
        position_BS = chunk.start_B[:, None] - self.size + jnp.arange(self.size)[None]
        old_BS = position_BS % self.size
        before_BS = jnp.where(position_BS >= 0, _take(chunk.before_BS, old_BS), 0)
        both = jax.tree.map(
            lambda old, new: jnp.concatenate([_take(old, old_BS), new.astype(old.dtype)], axis=1),
            self.read(unit),
            fresh,
        )
        mask = Mask(
            query_segments_BT=chunk.segment_BT,
            key_segments_BS=jnp.concatenate([before_BS, chunk.segment_BT], axis=1),
            query_offset=self.size,
            window=window,
        )
        slots_S = jnp.arange(self.size, dtype=jnp.int32)
        kept_BS = slot_positions(chunk.last_B, slots_S, self.size) - position_BS[:, :1]
        kept = jax.tree.map(lambda x: _take(x, kept_BS), both)
        cache = self._put(kept, lambda x, new: lax.dynamic_update_index_in_dim(x, new, unit, 0))
        return cache, Fresh(both, mask)


def slot_positions(last_B: jax.Array, slot_S: jax.Array, size: int) -> jax.Array:
    """Returns the position that each slot holds, int32 position_BS; < 0 for none.

    Args:
      last_B: the last cached position of each row; -1 for none.
      slot_S: slot numbers.
      size: slots per row.
    """
    return last_B[:, None] - (last_B[:, None] - slot_S[None]) % size


def _take(x_BSX: jax.Array, index_BR: jax.Array) -> jax.Array:
    """x_BSX[b, index_BR[b]] for every row; an index outside takes the nearest entry."""
    index_BR = jnp.clip(index_BR, 0, x_BSX.shape[1] - 1)
    take = jax.vmap(lambda x_SX, index_R: x_SX.at[index_R].get(mode="promise_in_bounds"))
    return take(x_BSX, index_BR)


_WINDOWS = lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2, 3),
    inserted_window_dims=(0, 1),
    scatter_dims_to_operand_dims=(0, 1, 2),
)


def _scatter(x_UBSKH: jax.Array, rows_BTKH: jax.Array, unit: jax.Array, slot_B: jax.Array) -> Any:
    """Writes T tokens per row of the batch from `slot_B` on; rows that do not fit are dropped."""
    B = slot_B.shape[0]
    index_B3 = jnp.stack([jnp.broadcast_to(unit, (B,)), jnp.arange(B), slot_B], axis=1)
    return lax.scatter(
        x_UBSKH,
        index_B3.astype(jnp.int32),
        rows_BTKH,
        _WINDOWS,
        indices_are_sorted=True,
        unique_indices=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )


def _merge(x_UBSKH: jax.Array, rows_BTKH: jax.Array, unit: jax.Array, chunk: Chunk) -> jax.Array:
    """Writes a chunk into consecutive slots, except the slots of padding."""
    size, T = x_UBSKH.shape[2], min(rows_BTKH.shape[1], x_UBSKH.shape[2])
    first_B = jnp.minimum(chunk.start_B, size - T)
    index_BT = first_B[:, None] + jnp.arange(T)[None] - chunk.start_B[:, None]
    is_new_BT = (index_BT >= 0) & (_take(chunk.segment_BT, index_BT) != 0)

    def read_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        at = (unit, *row, 0, 0)
        return lax.dynamic_slice(x_UBSKH, at, (1, 1, T, *x_UBSKH.shape[3:]))[0, 0]

    # Row by row: as one gather, XLA would copy the whole stack on a TPU.
    old_BTKH = lax.map(read_row, (jnp.arange(first_B.shape[0], dtype=jnp.int32), first_B))
    new_BTKH = _take(rows_BTKH, index_BT)
    merged_BTKH = jnp.where(is_new_BT[:, :, None, None], new_BTKH, old_BTKH)
    return _scatter(x_UBSKH, merged_BTKH, unit, first_B)
