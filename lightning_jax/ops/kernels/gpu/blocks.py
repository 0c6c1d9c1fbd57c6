"""Tiles of the GPU attention kernels, and which blocks of the score matrix a tile visits."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lightning_jax.runtime import target


@dataclasses.dataclass(frozen=True)
class Tile:
    """One kernel's share of the score matrix, and how the compiler lays it out.

    Attributes:
        query: query positions per block, a power of two of at least 16.
        key: keys per block, likewise.
        warps: warps per program; four of them issue one `wgmma` on Hopper.
        stages: blocks in flight between global and shared memory.

    Raises:
        ValueError: a block size that the tensor cores cannot tile.
    """

    query: int
    key: int
    warps: int
    stages: int

    def __post_init__(self):
        for name in ("query", "key"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"tile {name}={size}: must be a power of two of at least 16")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the three training kernels; they change speed, and order of sums, only."""

    forward: Tile
    dquery: Tile
    dkey: Tile


# Shared memory that one program may use, by parts of a device's name: the tiles of a class fit
# there. Compute capabilities 9.0, 10.0 and 10.3; then 8.0 and 8.7.
_CLASS_OF_NAME = {
    "hopper": ("H100", "H200", "H800", "H20", "GH200", "B200", "B300", "GB200", "GB300"),
    "ampere": ("A100", "A800", "A30", "Orin"),
}
_SMALL = "small"

# (class, head size) -> tiles for windows from `_WIDE` keys on. So says the compiler, without a GPU:
# on Hopper all products are `wgmma`, and no loop over unmasked blocks spills registers, except that
# of ("hopper", 128).dkey with a soft-cap (12). Which of the tiles that fit is fastest was not
# measured; suite `kernels_gpu` has a table for that.
_TILES = {
    ("hopper", 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    ("hopper", 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    ("hopper", 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),
    ("ampere", 64): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    ("ampere", 128): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    ("ampere", 256): Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    (_SMALL, 64): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    (_SMALL, 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (_SMALL, 256): Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}
# A block of P queries and blocks of S keys visit up to window + P + S keys a query: short blocks
# waste less of a narrow window, long ones read each key less often.
_WIDE = 512
_NARROW = {
    ("hopper", 64): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    ("hopper", 128): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
}
# float32 is not for speed: operands of twice the size, multiplied without tensor cores.
_FLOAT32 = {
    64: Tiles(*[Tile(32, 32, 8, 1)] * 3),
    128: Tiles(*[Tile(32, 32, 8, 1)] * 3),
    256: Tiles(*[Tile(16, 16, 8, 1)] * 3),
}


def device_class() -> str:
    """Returns the row of the tile table for the target.

    A target that is no GPU gets Hopper's: it lowers for GPUs by name
    (`lowering_platforms=("cuda",)`).
    """
    now = target.current()
    if now.platform != "gpu":
        return "hopper"
    words = now.device_kind.replace("-", " ").split()
    return next((name for name, kinds in _CLASS_OF_NAME.items() if set(words) & set(kinds)), _SMALL)


def tiles_for(device: str, head_dim: int, window: int, itemsize: int) -> Tiles:
    """Returns the tiles for a device class, head size, window and width of the inputs in bytes."""
    if itemsize > 2:
        return _FLOAT32[max(64, head_dim)]
    key = device, max(64, head_dim)
    return _NARROW.get(key, _TILES[key]) if window < _WIDE else _TILES[key]


class Span(NamedTuple):
    """Blocks `begin` to `end` are visited; those from `full_begin` to `full_end` need no mask."""

    begin: jax.Array
    full_begin: jax.Array
    full_end: jax.Array
    end: jax.Array


class Band(NamedTuple):
    """Which pairs of a row are visible: the queries are the last of the keys.

    Attributes:
        queries: queries of a row.
        offset: keys before the first query.
        window: visible keys, self included, at most `keys`.
    """

    queries: int
    offset: int
    window: int

    @property
    def keys(self) -> int:
        """Keys of a row."""
        return self.offset + self.queries


def key_span(block: jax.Array, tile: Tile, band: Band) -> Span:
    """Returns the key blocks that a block of queries sees in one document."""
    first = band.offset + block * tile.query
    after = first + tile.query
    begin = _div(jnp.maximum(first - band.window + 1, 0), tile.key)
    end = _cdiv(jnp.minimum(after, band.keys), tile.key)
    full_begin = _cdiv(jnp.maximum(after - band.window, 0), tile.key)
    return _ordered(begin, full_begin, _div(first + 1, tile.key), end)


def query_span(block: jax.Array, tile: Tile, band: Band) -> Span:
    """Returns the query blocks that see a block of keys in one document; none if no query does."""
    first, after = block * tile.key, (block + 1) * tile.key

    def query(key):
        """The query that is this key, within the row."""
        return jnp.clip(key - band.offset, 0, band.queries)

    begin = _div(query(first), tile.query)
    end = _cdiv(query(jnp.minimum(after, band.keys) + band.window - 1), tile.query)
    full_begin = _cdiv(query(after - 1), tile.query)
    return _ordered(begin, full_begin, _div(query(first + band.window), tile.query), end)


def packed_spans(span_of, segments_BI, segments_BJ, sizes, tile, band) -> jax.Array:
    """Narrows the spans of one document to those of packed documents.

    A block is left out where no document of one side occurs on the other, and needs no mask only
    where both sides lie in one and the same document. Documents may come in any order; they are
    compared by the range of their numbers, so blocks of documents out of order may be visited
    without need, but none is left out wrongly.

    Args:
        span_of: `key_span` or `query_span`.
        segments_BI: document of each position on the side that owns the spans, 0 for padding.
        segments_BJ: the same on the side that is walked.
        sizes: block sizes of the two sides.
        tile: handed to `span_of`.
        band: likewise.

    Returns:
        int32 [B, blocks, 4], a `Span` per row and block.
    """
    lowest_BI, highest_BI, single_BI = _ranges(segments_BI, sizes[0])
    sides = _ranges(segments_BJ, sizes[1])
    blocks_I = jnp.arange(lowest_BI.shape[1], dtype=jnp.int32)
    span = jax.vmap(lambda block: span_of(block, tile, band))(blocks_I)
    reach = min(sides[0].shape[1], (band.window + sizes[0] - 2) // sizes[1] + 2)
    other_IR = span.begin[:, None] + jnp.arange(reach, dtype=jnp.int32)[None]
    inside_IR = other_IR < span.end[:, None]
    whole_IR = (other_IR >= span.full_begin[:, None]) & (other_IR < span.full_end[:, None])
    column_IR = jnp.minimum(other_IR, sides[0].shape[1] - 1)
    lowest_BIR, highest_BIR, single_BIR = (side[:, column_IR] for side in sides)
    meets_BIR = (lowest_BI[..., None] <= highest_BIR) & (lowest_BIR <= highest_BI[..., None])
    same_BIR = single_BI[..., None] & single_BIR & (lowest_BI[..., None] == lowest_BIR)
    narrow = _narrowed(meets_BIR & inside_IR[None], same_BIR & whole_IR[None])
    return jnp.stack([span.begin[None] + edge for edge in narrow], axis=-1)


def _narrowed(need_BIR, full_BIR):
    """First and last needed column, and the last unbroken run of full ones, as offsets."""
    reach = need_BIR.shape[-1]
    column_R = jnp.arange(reach, dtype=jnp.int32)[None, None]
    last = jnp.max(jnp.where(need_BIR, column_R + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(need_BIR, column_R, reach), axis=-1), last)
    full_last = jnp.max(jnp.where(full_BIR, column_R + 1, 0), axis=-1)
    gap_BIR = ~full_BIR & (column_R < full_last[..., None])
    full_first = jnp.max(jnp.where(gap_BIR, column_R + 1, 0), axis=-1)
    return _ordered(first, full_first, full_last, last)


def _ranges(segments_BT, size):
    """Lowest and highest document of each block, and whether it holds that one alone."""
    edge = jnp.iinfo(jnp.int32)
    padding = -segments_BT.shape[1] % size
    blocks_BIP = jnp.pad(segments_BT, ((0, 0), (0, padding))).reshape(len(segments_BT), -1, size)
    lowest_BI = jnp.min(jnp.where(blocks_BIP == 0, edge.max, blocks_BIP), axis=-1)
    highest_BI = jnp.max(jnp.where(blocks_BIP == 0, edge.min, blocks_BIP), axis=-1)
    single_BI = jnp.all(blocks_BIP == blocks_BIP[..., :1], axis=-1) & (blocks_BIP[..., 0] != 0)
    return lowest_BI, highest_BI, single_BI


def _ordered(begin, full_begin, full_end, end) -> Span:
    full_end = jnp.clip(full_end, begin, end)
    return Span(begin, jnp.clip(full_begin, begin, full_end), full_end, end)


def _div(x, size):
    # Operands are never negative, and `//` would spend instructions on the case that they were.
    return lax.div(x, np.int32(size))


def _cdiv(x, size):
    return _div(x + (size - 1), size)
