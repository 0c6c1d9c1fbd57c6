"""How the grouped matmuls for TPUs cut their arrays, and which do not fit fast memory."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax.ops.kernels import common
from lightning_jax.ops.kernels.tpu import blocks
from lightning_jax.ops.kernels.tpu.band import LANES

DTYPES = (jnp.bfloat16, jnp.float32)
# A product of more contracted columns is a loop, or its unrolled code would grow with them.
CHUNK = 512
# Rows of a register of bfloat16.
_SUBLANES = 16
# Bytes of fast memory for what a kernel holds besides its blocks.
_MARGIN = 2**20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernels cut their arrays; changes speed and memory, and the order of sums.

    Attributes:
      rows: rows of a tile.
      part: rows of the smallest products at the edges of a group, a power of two.
      columns: most columns of a block of results.
    """

    rows: int = 512
    part: int = 256
    columns: int = 512


# Exact products of float32 operands are six of bfloat16 ones, and so is their code.
_FLOAT32 = Tiles(256, 256, 256)


class Arrays(NamedTuple):
    """How many arrays a call of `dot` has: [S, K], weights, and [S, N] given or returned."""

    rows: int
    weights: int
    results: int


def cut(
    tiles: Tiles, arrays: Arrays, S: int, K: int, N: int, dtype: Any, weight_dtype: Any
) -> tuple[int, int]:
    """Rows and columns of a block of `dot`'s results, as many as fast memory has room for.

    Raises:
      ValueError: K is so large that the smallest blocks do not fit.
    """
    size, weight_size = jnp.dtype(dtype).itemsize, jnp.dtype(weight_dtype).itemsize
    padded = -(-K // LANES) * LANES
    column = padded * arrays.weights * weight_size
    columns = block(N, min(tiles.columns, _fitting(column)))
    width = -(-columns // LANES) * LANES
    for tile in heights(tiles, S):
        row = (padded * arrays.rows + width * arrays.results) * size
        # Two of each: one is used while the other is moved.
        used = 2 * (tile * row + width * column)
        if K > CHUNK:
            used += tile * width * arrays.weights * 4
        if used + _MARGIN <= limit():
            return tile, columns
    raise ValueError(
        f"implementation = 'pallas_tpu': products over {K} columns need"
        f" {(used + _MARGIN) >> 20} MiB of fast memory, and kernels have {limit() >> 20}:"
        " split the model's or the experts' width over more devices, or use 'ragged_dot'"
    )


def tiles_for(dtype: Any) -> Tiles:
    """Tiles for rows of a dtype."""
    return _FLOAT32 if dtype == jnp.float32 else Tiles()


def heights(tiles: Tiles, S: int) -> list[int]:
    """Rows that a tile may have, from the most to the least."""
    most = -(-S // _SUBLANES) * _SUBLANES
    halves = (tiles.rows >> i for i in range(tiles.rows.bit_length()))
    return [min(rows, most) for rows in halves if rows >= tiles.part]


def limit() -> int:
    """Bytes of fast memory that a kernel may take."""
    return blocks.fast_memory(blocks.device_kind()) * 3 // 4


def _fitting(column_bytes: int) -> int:
    """Columns of weights of which two blocks fill a quarter of fast memory; at least LANES."""
    part = blocks.fast_memory(blocks.device_kind()) // 4
    return max(part // (2 * column_bytes) // LANES * LANES, LANES)


def block(size: int, most: int) -> int:
    """Columns of a block: all, or a multiple of a register's width that cuts them evenly."""
    if size <= most:
        return size
    count = -(-size // most)
    return -(-size // (count * LANES)) * LANES


def check(rows: int, dims: tuple[int, int], dtype: Any, weight_dtype: Any) -> None:
    """Raises a ValueError if the kernels do not take an MLP, forward and backward.

    Args:
      rows: S.
      dims: D and F.
      dtype, weight_dtype: of the rows and of the weights.
    """
    common.check_dtypes("pallas_tpu", (jax.ShapeDtypeStruct((), dtype),), DTYPES)
    D, F = dims
    tiles = tiles_for(dtype)
    for arrays, K, N in (
        (Arrays(1, 2, 3), D, F),
        (Arrays(1, 1, 1), F, D),
        (Arrays(1, 1, 5), D, F),
        (Arrays(2, 2, 1), F, D),
    ):
        cut(tiles, arrays, rows, K, N, dtype, weight_dtype)
