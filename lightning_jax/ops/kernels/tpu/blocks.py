"""Block sizes of the TPU attention kernels by device, head size and window, as measured."""

from __future__ import annotations

import dataclasses

from lightning_jax.ops.kernels.tpu.band import LANES, BlockSizes
from lightning_jax.runtime import target


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of both passes."""

    forward: BlockSizes
    backward: BlockSizes

    @property
    def longest(self) -> int:
        """Queries are padded to a multiple of this, and so are the keys before them."""
        return max(self.forward.block, self.backward.block)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A row of the table, in what does not depend on how heads are grouped.

    Attributes:
        tile: query positions, and keys, of one product.
        chains: tiles in flight at once, of one head or of several that share keys.
        visit: key tiles between two updates of the running softmax.
    """

    tile: int
    chains: int
    visit: int


# Windows up to this are "short", longer ones "long", and "all" is none.
_SHORT = 2048
# (device kind, head size, window) -> forward and backward. Static cycles of libtpu 0.0.42 for
# bfloat16, length 4096 and window 1024, or length 16384 and window 4096, or length 4096 and none
# (`experiments.benchmark --suite=kernels_tpu`); where two were within 2%, the shorter program.
_TABLE = {
    ("TPU v5 lite", 64, "short"): (Tuned(256, 4, 4), Tuned(256, 2, 4)),
    ("TPU v5 lite", 128, "short"): (Tuned(256, 4, 4), Tuned(256, 2, 4)),
    ("TPU v5 lite", 256, "short"): (Tuned(256, 2, 4), Tuned(256, 1, 4)),
    ("TPU v6 lite", 64, "short"): (Tuned(512, 2, 4), Tuned(512, 1, 4)),
    ("TPU v6 lite", 128, "short"): (Tuned(512, 2, 4), Tuned(512, 2, 4)),
    ("TPU v6 lite", 128, "long"): (Tuned(512, 2, 4), Tuned(512, 1, 4)),
    ("TPU v6 lite", 256, "short"): (Tuned(512, 2, 4), Tuned(512, 1, 4)),
}
# MiB of vector memory where it is not 128.
_FAST_MEMORY = {"TPU v4": 16, "TPU v5": 64, "TPU v5p": 64, "TPU7x": 64}
_OTHER_DEVICE = "TPU v5 lite"
# Exact products of float32 operands are six of bfloat16 ones: one chain fills the matrix unit.
_FLOAT32 = Tuned(256, 1, 2)


def device_kind() -> str:
    """Returns what the target calls itself if it is a TPU, else ""."""
    now = target.current()
    return now.device_kind if now.platform == "tpu" else ""


def fast_memory(kind: str) -> int:
    """Returns the bytes of vector memory of a core; the commonest size for an unknown device."""
    return _FAST_MEMORY.get(kind, 128) * 2**20


def blocks_for(
    kind: str,
    head_size: int,
    group: int,
    queries: int,
    window: int | None,
    itemsize: int,
    offset: int = 0,
) -> Blocks:
    """Returns block sizes for `queries` after `offset` keys, `window` visible (None for all).

    `head_size` is the padded one, `group` the number of query heads per key/value head. Windows
    that are a multiple of the tile are cheapest, so the tile shrinks to divide a short one.
    """
    reach = "all"
    if window is not None and window < offset + queries:
        reach = "short" if window <= _SHORT else "long"
    choices = (kind, reach), (kind, "short"), (_OTHER_DEVICE, "short")
    keys = [(device, min(head_size, 256), part) for device, part in choices]
    rows = next(_TABLE[key] for key in keys if key in _TABLE)
    if itemsize == 4:
        rows = _FLOAT32, _FLOAT32
    # Without keys to leave out, blocks start at multiples of their size, even before the queries.
    before = 0 if window is not None and window - 1 <= offset else offset
    return Blocks(*(_fit(row, group, queries, window, before) for row in rows))


def _fit(row: Tuned, group: int, queries: int, window: int | None, before: int) -> BlockSizes:
    tile = row.tile
    if window and window % LANES == 0:
        while window % tile:
            tile //= 2
    stack = min(row.chains, group & -group)
    tiles = row.chains // stack

    def padding(block):
        return before % block + -(before + queries) % block

    # Padding to whole blocks may add an eighth.
    while tile * tiles > LANES and padding(tile * tiles) > queries // 8:
        tile, tiles = (tile, tiles // 2) if tiles > 1 else (tile // 2, tiles)
    return BlockSizes(tile=tile, tiles=tiles, stack=stack, visit=row.visit)
