"""How the TPU attention kernels cut the score matrix: block sizes, the band, the ring of keys."""

from __future__ import annotations

import dataclasses

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lightning_jax.ops.kernels.common import LOG2_E

# Rows of a vector register hold 128 lanes; the log-sum-exp of a tile fills whole ones.
LANES = 128

# What the compiler may spill besides the scores of one visit.
_SPILL_BYTES = 12 * 2**20


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How a kernel cuts the score matrix; changes speed and memory, never the meaning.

    Attributes:
        tile: query positions, and keys, of one product.
        tiles: tiles of query positions in a grid step; their chains of products run interleaved.
        stack: query heads of one key/value head that are multiplied as one matrix.
        visit: key tiles between two updates of the running softmax, where the window is longer.

    Raises:
        ValueError: a size that is not a power of two.
    """

    tile: int
    tiles: int
    stack: int
    visit: int

    def __post_init__(self):
        for name in ("tile", "tiles", "stack", "visit"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"block size {name}={size}: must be a power of two")

    @property
    def block(self) -> int:
        """Query positions of a grid step."""
        return self.tile * self.tiles


@dataclasses.dataclass(frozen=True)
class Band:
    """Everything static about one call: the trace is specialised to it.

    A grid step takes a block of keys, and the block of queries at the same place of the row; the
    first `lead` steps, whose keys lie before all queries, only take keys. Heads lie side by side in
    the lanes, so a grid step takes `kv_step` key/value heads, enough to fill 128 lanes, and
    `heads_step` query heads of theirs.

    Attributes:
        length: padded number of keys, whole blocks.
        offset: keys before the first query, whole blocks.
        window: visible keys, self included; `length` for all.
        kv_heads: K.
        group: query heads per key/value head.
        head_size: padded head size.
        scale: factor of the scores.
        softcap: bound of the scores or None.
        segments: whether queries and keys have segments.
        sinks: whether heads have sinks.
        blocks: block sizes.
        fast_memory: bytes of vector memory of the device.
        interpret: run as plain JAX, or in a simulation of a TPU's memories.
    """

    length: int
    offset: int
    window: int
    kv_heads: int
    group: int
    head_size: int
    scale: float
    softcap: float | None
    segments: bool
    sinks: bool
    blocks: BlockSizes
    fast_memory: int
    interpret: bool | pltpu.InterpretParams

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by, so that their product with keys is ready for exp2, or
        for the tanh of the soft-cap."""
        return self.scale * LOG2_E if self.softcap is None else self.scale / self.softcap

    @property
    def steps(self) -> int:
        """Grid steps along the keys."""
        return self.length // self.blocks.block

    @property
    def lead(self) -> int:
        """Grid steps before that of the first queries."""
        return self.offset // self.blocks.block

    @property
    def kv_step(self) -> int:
        """Key/value heads of a grid step: whole lanes, or all of them."""
        heads = max(1, LANES // self.head_size)
        return self.kv_heads if self.kv_heads % heads else heads

    @property
    def parts(self) -> int:
        """Grid steps that share the key/value heads of a step."""
        whole = self.blocks.stack * self.head_size % LANES == 0
        return self.group // self.blocks.stack if self.kv_step == 1 and whole else 1

    @property
    def heads_step(self) -> int:
        """Query heads of a grid step."""
        return self.kv_step * self.group // self.parts

    @property
    def heads_steps(self) -> int:
        """Grid steps that all query heads of a block take."""
        return self.kv_heads * self.group // self.heads_step

    def head_lanes(self, head: int) -> slice:
        """The lanes of a head, counted within its grid step."""
        return slice(head * self.head_size, (head + 1) * self.head_size)

    @property
    def stacks(self) -> list[tuple[int, list[int]]]:
        """(key/value head, query heads of one matrix), counted within a grid step."""
        per_kv, stack = self.group // self.parts, self.blocks.stack
        return [
            (kv, list(range(kv * per_kv + first, kv * per_kv + first + stack)))
            for kv in range(self.kv_step)
            for first in range(0, per_kv, stack)
        ]

    @property
    def running_steps(self) -> range:
        """Grid steps of queries that may see less than a full window."""
        return range(self.lead, self.folded_from)

    @property
    def folded_steps(self) -> range:
        """Grid steps of queries that all have full windows, whose ends are folded."""
        return range(max(self.lead, self.folded_from), self.steps)

    @property
    def folded_from(self) -> int:
        """First grid step whose queries all have full windows that end with whole tiles.

        There the tile that holds a query and the one a window before it show complementary
        triangles, and are folded into one. `steps` where that never happens.
        """
        tile, block = self.blocks.tile, self.blocks.block
        if self.window % tile or self.window >= self.length:
            return self.steps
        return min(self.steps, -(-self.window // block))

    @property
    def folded_interior(self) -> int:
        """Key tiles between the two ends of a full window."""
        return self.window // self.blocks.tile - 1

    @property
    def folded_first(self) -> int:
        """How many of those are visited together with the ends: all, or what fills no visit."""
        interior, visit = self.folded_interior, self.blocks.visit
        return interior if interior < 2 * visit else interior % visit

    @property
    def interior_blocks(self) -> int:
        """Earlier blocks of keys that every query of a block sees whole."""
        return min(max(0, self.window // self.blocks.block - 1), self.folded_from - 1)

    @property
    def edge_blocks(self) -> range:
        """How far back the blocks lie that the windows of an unfolded block cut."""
        return range(self.interior_blocks + 1, min(self.lag, self.folded_from - 1) + 1)

    @property
    def lag(self) -> int:
        """Blocks of queries after its own that see a block of keys."""
        return min((self.window - 2 + self.blocks.block) // self.blocks.block, self.steps - 1)

    @property
    def ring(self) -> int:
        """Keys that are kept in fast memory: a power of two, or all."""
        return min(1 << self.lag.bit_length(), self.steps) * self.blocks.block

    def ring_slice(self, key: jax.Array, size: int) -> pl.Slice | slice:
        """Where the ring holds the keys from `key` on; `key` and the ring are multiples of size."""
        if self.ring < self.length:
            key = lax.bitwise_and(key, self.ring - 1)
        return pl.ds(pl.multiple_of(key, size), size)

    def sees(self, distance: int) -> bool:
        """Whether any query of a tile sees a key of the tile `distance` tiles before it."""
        return (distance - 1) * self.blocks.tile + 1 < self.window

    def cut(self, distance: int) -> bool:
        """Whether the window hides pairs between two tiles `distance` apart."""
        return (distance + 1) * self.blocks.tile > self.window

    @property
    def statistic_lanes(self) -> int:
        """Lanes in which a statistic of a row is repeated."""
        return min(LANES, self.blocks.tile)

    def vmem_limit(self, itemsize: int, gradients: bool) -> int:
        """Bytes of fast memory that a kernel may use: its blocks and rings, and room to spill.

        Raises:
            ValueError: the device has not as much.
        """
        kv_lanes, lanes = self.kv_step * self.head_size, self.heads_step * self.head_size
        arrays = 4 * (lanes + kv_lanes) if gradients else 2 * (lanes + kv_lanes)
        blocks = 2 * self.blocks.block * arrays * itemsize
        ring = 2 * self.ring * kv_lanes * (itemsize + 4 if gradients else itemsize)
        if self.segments:
            ring += self.ring * 4 * (self.statistic_lanes if gradients else 8)
        visit = 2 if gradients else 2 * self.blocks.visit + 1
        scores = 4 * self.blocks.block * self.blocks.stack * self.blocks.tile * visit
        needed = blocks + ring + scores + _SPILL_BYTES
        if needed > self.fast_memory:
            raise ValueError(
                f"pallas_tpu: a block of queries sees {self.ring} keys of {self.head_size} x"
                f" {self.kv_step}, which take {needed >> 20} MiB of fast memory, not"
                f" {self.fast_memory >> 20}: use a shorter window or 'xla_banded'"
            )
        return needed

    def cost(self, batch: int, products: int, arrays: list[jax.Array]) -> pl.CostEstimate:
        """What a kernel with so many products of every visible pair costs XLA's scheduler."""

        def seen(rows: int) -> int:
            """Pairs that the first queries of a row would see."""
            full = max(0, rows - self.window)
            return (rows - full) * (rows - full + 1) // 2 + full * self.window

        pairs = batch * self.kv_heads * self.group * (seen(self.length) - seen(self.offset))
        return pl.CostEstimate(
            flops=2 * products * pairs * self.head_size,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )
