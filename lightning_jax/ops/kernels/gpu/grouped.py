"""Grouped matmuls for GPUs in Pallas Triton: rows sorted by expert, times weights or one another.

A program computes one tile of results, of one expert: tiles start where the expert's rows start, so
no two programs write the same row. There are as many programs as any group sizes could need, of
which the superfluous ones end at once. Weight gradients are summed over an expert's rows by one
program in a fixed order: same inputs, same bits, without atomics.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from lightning_jax.ops.kernels import common, grouped
from lightning_jax.ops.kernels.common import dot
from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# Fewer rows do not fill a tile of the tensor cores.
_LEAST = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a program's tile, powers of two of at least 16, and how the compiler lays it out.

    Attributes:
      rows: rows of results (of a step of the sum, for weight gradients).
      inner: contracted columns at once (of results, for weight gradients).
      columns: columns of results.
      warps: warps per program.
      stages: steps in flight between global and shared memory.
    """

    rows: int
    inner: int
    columns: int
    warps: int
    stages: int


# By class of device, for both kernels; of those that fit, which is fastest was not measured.
_DOT = {
    "hopper": Tiles(128, 64, 128, 8, 3),
    "ampere": Tiles(128, 32, 128, 8, 3),
    "small": Tiles(64, 32, 64, 4, 2),
}
_OUTER = {
    "hopper": Tiles(64, 128, 128, 8, 3),
    "ampere": Tiles(32, 128, 128, 8, 3),
    "small": Tiles(32, 64, 64, 4, 2),
}
# float32 is not for speed: multiplied without tensor cores.
_FLOAT32 = Tiles(32, 32, 32, 4, 1)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """`ops.kernels.grouped.Kernels` for GPUs; None for tiles by device."""

    interpret: bool = False
    dot_tiles: Tiles | None = None
    outer_tiles: Tiles | None = None

    def dot(self, product, rows, weights, size_E, unit, biases, extras):
        S, K = rows[0].shape
        N = weights[0].shape[-2 if product.transposed else -1]
        tiles = self.dot_tiles or _table(_DOT, rows[0].dtype, S // len(size_E))
        visits = _list_visits(size_E, S, tiles.rows, product.fill)
        arrays = (unit.reshape(1), *visits, *rows, *weights, *biases, *extras)
        counts = len(rows), len(weights), len(biases), len(extras)
        return pl.pallas_call(
            functools.partial(_dot_kernel, product, tiles, counts, len(size_E)),
            grid=(pl.cdiv(N, tiles.columns), len(visits[0])),
            out_shape=[jax.ShapeDtypeStruct((S, N), rows[0].dtype)] * product.outputs,
            compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
            interpret=self.interpret,
            name="grouped_dot",
        )(*arrays)

    def outer(self, left_SK, right, size_E, dtype):
        K, N, E = left_SK.shape[1], right[0].shape[1], len(size_E)
        tiles = self.outer_tiles or _table(_OUTER, left_SK.dtype)
        end_E = jnp.cumsum(size_E)
        return pl.pallas_call(
            functools.partial(_outer_kernel, tiles),
            grid=(pl.cdiv(N, tiles.columns), pl.cdiv(K, tiles.inner), E),
            out_shape=[jax.ShapeDtypeStruct((E, K, N), dtype)] * len(right),
            compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
            interpret=self.interpret,
            name="grouped_outer",
        )(end_E - size_E, end_E, left_SK, *right)


def _table(table: dict[str, Tiles], dtype, rows: int | None = None) -> Tiles:
    """Tiles for the target; of fewer rows where experts have few, as in decoding."""
    tiles = _FLOAT32 if dtype == jnp.float32 else table[gpu_blocks.device_class()]
    if rows is None:
        return tiles
    least = max(_LEAST, 1 << max(0, rows - 1).bit_length())
    return dataclasses.replace(tiles, rows=min(tiles.rows, least))


def _list_visits(size_E, rows: int, tile: int, fill: bool):
    """int32 [V]: expert, first row and end of each tile of results; no rows where there is none.

    Rows past the last group are those of a further expert, E, with `fill`.
    """
    size_G = jnp.append(size_E, rows - jnp.sum(size_E) if fill else 0)
    end_G = jnp.cumsum(size_G)
    after_G = jnp.cumsum(-(-size_G // tile))
    before_G = after_G + size_G // -tile
    step_V1 = jnp.arange(rows // tile + len(size_G), dtype=jnp.int32)[:, None]
    mine_VG = (step_V1 >= before_G[None]) & (step_V1 < after_G[None])

    def of_mine(x_G):
        return jnp.sum(jnp.where(mine_VG, x_G[None], 0), axis=1, dtype=jnp.int32)

    # Where there is nothing to do, the end is 0, and so before the start.
    start_V = of_mine(end_G - size_G - before_G * tile) + tile * step_V1[:, 0]
    return of_mine(jnp.arange(len(size_G))), start_V, of_mine(end_G)


def _load(ref, rows, columns, unmasked: tuple[bool, bool], lead: tuple[jax.Array, ...] = ()):
    """A tile of `ref[lead]`; `rows` and `columns` are (first, count, end), and it is 0 beyond.

    `unmasked` says which axis is known to have no end inside the tile.
    """
    view = ref.at[(*lead, pl.ds(*rows[:2]), pl.ds(*columns[:2]))]
    inside = _inside(rows, columns, unmasked)
    return plt.load(view) if inside is None else plt.load(view, mask=inside, other=0)


def _inside(rows, columns, unmasked):
    shape = rows[1], columns[1]
    found = [
        lax.broadcast_in_dim(first + jnp.arange(count) < end, shape, (axis,))
        for axis, (first, count, end) in enumerate((rows, columns))
        if not unmasked[axis]
    ]
    return functools.reduce(jnp.logical_and, found) if found else None


def _dot_kernel(product: grouped.Product, tiles: Tiles, counts, experts: int, *refs):
    unit, expert, start, end, *refs = refs
    groups = []
    for count in counts:
        groups.append(refs[:count])
        refs = refs[count:]
    rows, weights, biases, extras = groups
    (_, K), N = rows[0].shape, refs[0].shape[1]
    step = pl.program_id(1)
    unit, expert, start, end = unit[0], expert[step], start[step], end[step]
    at_rows = start, tiles.rows, end
    at_columns = pl.program_id(0) * tiles.columns, tiles.columns, N
    even = K % tiles.inner == 0, N % tiles.columns == 0

    def body(index, sums):
        inner = index * tiles.inner, tiles.inner, K
        lefts = [_load(row, at_rows, inner, (False, even[0])) for row in rows]
        found = []
        for i, (total, weight) in enumerate(zip(sums, weights, strict=True)):
            left, lead = lefts[i % len(lefts)], (unit, expert)
            if product.transposed:
                part = _load(weight, at_columns, inner, (even[1], even[0]), lead)
            else:
                part = _load(weight, inner, at_columns, even, lead)
            contract = (1, 1 if product.transposed else 0)
            found.append(total + dot(left, part.astype(left.dtype), contract))
        return found

    zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    filled = jnp.logical_and(start < end, expert < experts)
    trips = jnp.where(filled, np.int32(pl.cdiv(K, tiles.inner)), np.int32(0))
    products = lax.fori_loop(0, trips, body, [zeros] * len(weights))
    for i, bias in enumerate(biases):
        mask = at_columns[0] + jnp.arange(tiles.columns) < jnp.where(
            filled, np.int32(N), np.int32(0)
        )
        view = bias.at[unit, jnp.minimum(expert, experts - 1), pl.ds(*at_columns[:2])]
        products[i] += plt.load(view, mask=mask, other=0).astype(jnp.float32)[None]
    extras = [_load(x, at_rows, at_columns, (False, even[1])).astype(jnp.float32) for x in extras]
    inside = _inside(at_rows, at_columns, (False, even[1]))
    for out, value in zip(refs, product.finish(products, extras), strict=True):
        view = out.at[pl.ds(*at_rows[:2]), pl.ds(*at_columns[:2])]
        plt.store(view, value.astype(out.dtype), mask=inside)


def _outer_kernel(tiles: Tiles, start, end, left, *refs):
    right, outs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    K, N = outs[0].shape[1:]
    expert = pl.program_id(2)
    start, end = start[expert], end[expert]
    at_inner = pl.program_id(1) * tiles.inner, tiles.inner, K
    at_columns = pl.program_id(0) * tiles.columns, tiles.columns, N
    even = K % tiles.inner == 0, N % tiles.columns == 0

    def body(index, sums):
        rows = start + index * tiles.rows, tiles.rows, end
        left_part = _load(left, rows, at_inner, (False, even[0]))
        return [
            total + dot(left_part, _load(x, rows, at_columns, (False, even[1])), (0, 0))
            for total, x in zip(sums, right, strict=True)
        ]

    zeros = jnp.zeros((tiles.inner, tiles.columns), jnp.float32)
    sums = lax.fori_loop(0, pl.cdiv(end - start, tiles.rows), body, [zeros] * len(right))
    inside = _inside(at_inner, at_columns, even)
    for out, total in zip(outs, sums, strict=True):
        view = out.at[expert, pl.ds(*at_inner[:2]), pl.ds(*at_columns[:2])]
        plt.store(view, total.astype(out.dtype), mask=inside)


def check(rows: int, dims: tuple[int, int], dtype: Any, weight_dtype: Any) -> None:
    """Raises a ValueError if the kernels do not take an MLP; all widths fit.

    Args:
      rows: S.
      dims: D and F.
      dtype, weight_dtype: of the rows and of the weights.
    """
    common.check_dtypes("pallas_gpu", (jax.ShapeDtypeStruct((), dtype),), DTYPES)


def grouped_mlp(
    rows_SD: jax.Array,
    size_E: jax.Array,
    weights: tuple[jax.Array, ...],
    biases: tuple[jax.Array, ...] = (),
    *,
    clamp: float | None = None,
    unit: jax.Array | None = None,
    interpret: bool = False,
    dot_tiles: Tiles | None = None,
    outer_tiles: Tiles | None = None,
) -> jax.Array:
    """`ops.experts.grouped_mlp` by Pallas Triton kernels, for NVIDIA GPUs from Ampere on.

    Args:
      rows_SD: bfloat16, float16 or float32; float32 products are not rounded to TF32.
      size_E, weights, biases, clamp, unit: as there.
      interpret: run as plain JAX on any device, for tests.
      dot_tiles, outer_tiles: tiles of matmuls and of weight gradients; by device by default.

    Raises:
      ValueError: a dtype that the kernels do not take.
    """
    S, D = rows_SD.shape
    check(S, (D, weights[0].shape[-1]), rows_SD.dtype, weights[0].dtype)
    kernels = Kernels(interpret, dot_tiles, outer_tiles)
    return grouped.grouped_mlp(kernels, rows_SD, size_E, weights, biases, clamp, unit)
