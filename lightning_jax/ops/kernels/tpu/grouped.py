"""Grouped matmuls for TPUs: rows sorted by expert, times their experts' weights or one another.

Rows are cut into tiles. A grid step is the visit of an expert to a tile that holds rows of it; the
visits are listed beforehand, experts in order, and the grid has as many steps as there are. A tile
that lies inside one group is one product. At the edges of a group smaller parts of the tile are
computed, those that hold rows of the expert, and only its rows are stored: the next visit adds its
own to the block of results, which stays in fast memory.

The list is what MegaBlocks (Gale et al., arXiv:2211.15841) and JAX's `megablox` use too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lightning_jax.ops.kernels import grouped
from lightning_jax.ops.kernels.common import dot
from lightning_jax.ops.kernels.tpu import grouped_blocks as blocks
from lightning_jax.ops.kernels.tpu.grouped_blocks import CHUNK, Arrays, Tiles, check


class Visits(NamedTuple):
    """The grid steps: int32 arrays with an entry for each, more than there are.

    Attributes:
      expert: whose weights are read.
      tile: the tile of rows.
      low, high: the expert's rows of the tile; none where they are equal.
      first: 1 for the first step of a tile (`dot`) or of an expert (`outer`).
      last: 1 for the last step of an expert.
    """

    expert: Any
    tile: Any
    low: Any
    high: Any
    first: Any
    last: Any


def look_up(visits: Visits, field: str, step: jax.Array) -> jax.Array:
    """An entry of the list. Benchmarks put arithmetic here, which a static profile can follow."""
    return getattr(visits, field)[step]


def list_visits(
    size_E: jax.Array, rows: int, tile: int, *, empty: bool = False, fill: bool = False
) -> tuple[Visits, jax.Array]:
    """Returns the visits of all experts to their tiles, and how many there are, at least one.

    Args:
      size_E: rows of each expert.
      rows: S.
      tile: rows of a tile.
      empty: an expert without rows has a visit too; "first" and "last" are those of an expert.
      fill: tiles past the last group have a visit too, without rows.
    """
    E, tiles = len(size_E), -(-rows // tile)
    end_E = jnp.cumsum(size_E)
    start_E = end_E - size_E
    tile_E = jnp.minimum(start_E // tile, tiles - 1)
    count_E = jnp.where(size_E > 0, (end_E - 1) // tile - tile_E + 1, int(empty))
    after_E = jnp.cumsum(count_E)
    count = after_E[-1]
    step_V1 = jnp.arange(tiles + E - 1, dtype=jnp.int32)[:, None]
    mine_VE = (step_V1 >= (after_E - count_E)[None]) & (step_V1 < after_E[None])

    def of_mine(x_E):
        return jnp.sum(jnp.where(mine_VE, x_E[None], 0), axis=1, dtype=jnp.int32)

    step_V = step_V1[:, 0]
    tile_V = of_mine(tile_E - (after_E - count_E)) + step_V
    expert_V = of_mine(jnp.arange(E))
    low_V, high_V = (
        jnp.clip(of_mine(edge_E) - tile_V * tile, 0, tile) for edge_E in (start_E, end_E)
    )
    # Steps past the last group read no other weights, and fill the tiles that nobody visits.
    beyond_V = step_V >= count
    last_expert = jnp.max(jnp.where(size_E > 0, jnp.arange(E), 0))
    expert_V = jnp.where(beyond_V, last_expert, expert_V)
    filled = (end_E[-1] + tile - 1) // tile
    tile_V = jnp.where(beyond_V, jnp.minimum(filled + step_V - count, tiles - 1), tile_V)
    low_V, high_V = (jnp.where(beyond_V, 0, x_V) for x_V in (low_V, high_V))
    if fill:
        count += tiles - filled
    key_V = expert_V if empty else tile_V
    differs_V = key_V[1:] != key_V[:-1]
    yes = jnp.ones(1, bool)
    first_V = jnp.concatenate([yes, differs_V])
    last_V = jnp.concatenate([differs_V, yes]) | (step_V == count - 1)
    arrays = (expert_V, tile_V, low_V, high_V, first_V, last_V)
    return Visits(*(x_V.astype(jnp.int32) for x_V in arrays)), jnp.maximum(count, 1)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """`ops.kernels.grouped.Kernels` for TPUs."""

    interpret: bool | pltpu.InterpretParams = False
    tiles: Tiles = Tiles()

    def dot(self, product, rows, weights, size_E, unit, biases, extras):
        S, K = rows[0].shape
        N = weights[0].shape[-2 if product.transposed else -1]
        arrays = Arrays(len(rows), len(weights), len(extras) + product.outputs)
        tile, columns = blocks.cut(self.tiles, arrays, S, K, N, rows[0].dtype, weights[0].dtype)
        part = self._part(tile)
        visits, count = list_visits(size_E, S, tile, fill=product.fill)
        spec_SK = pl.BlockSpec((tile, K), lambda n, i, u, *v: (_tile(v, i), 0))
        spec_SN = pl.BlockSpec((tile, columns), lambda n, i, u, *v: (_tile(v, i), n))
        if product.transposed:
            block = pl.BlockSpec(
                (None, None, columns, K), lambda n, i, u, *v: (u[0], _expert(v, i), n, 0)
            )
        else:
            block = pl.BlockSpec(
                (None, None, K, columns), lambda n, i, u, *v: (u[0], _expert(v, i), 0, n)
            )
        spec_bias = pl.BlockSpec(
            (None, None, 1, columns), lambda n, i, u, *v: (u[0], _expert(v, i), 0, n)
        )
        biases = [bias[:, :, None] for bias in biases]
        call = _Dot(product, part, len(rows), len(weights), len(biases), len(extras))
        sums = len(weights) if K > CHUNK else 0
        return pl.pallas_call(
            functools.partial(_dot_kernel, call),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1 + len(visits),
                grid=(pl.cdiv(N, columns), count),
                in_specs=[
                    *[spec_SK] * len(rows),
                    *[block] * len(weights),
                    *[spec_bias] * len(biases),
                    *[spec_SN] * len(extras),
                ],
                out_specs=[spec_SN] * product.outputs,
                scratch_shapes=[pltpu.VMEM((tile, columns), jnp.float32)] * sums,
            ),
            out_shape=[jax.ShapeDtypeStruct((S, N), rows[0].dtype)] * product.outputs,
            compiler_params=self._parameters(("parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=2 * S * K * N * len(weights),
                bytes_accessed=rows[0].dtype.itemsize
                * S
                * (K * len(rows) + N * (len(extras) + product.outputs))
                + sum(w[0].size * w.dtype.itemsize for w in weights),
                transcendentals=0,
            ),
            interpret=self.interpret,
            name="grouped_dot",
        )(unit.reshape(1).astype(jnp.int32), *visits, *rows, *weights, *biases, *extras)

    def outer(self, left_SK, right, size_E, dtype):
        (S, K), N, E = left_SK.shape, right[0].shape[1], len(size_E)
        tile = blocks.heights(self.tiles, S)[0]
        part = self._part(tile)
        inner, columns = (blocks.block(x, self.tiles.columns) for x in (K, N))
        visits, count = list_visits(size_E, S, tile, empty=True)
        spec_SK = pl.BlockSpec((tile, inner), lambda k, n, i, *v: (_tile(v, i), k))
        spec_SN = pl.BlockSpec((tile, columns), lambda k, n, i, *v: (_tile(v, i), n))
        spec_out = pl.BlockSpec((None, inner, columns), lambda k, n, i, *v: (_expert(v, i), k, n))
        return pl.pallas_call(
            functools.partial(_outer_kernel, part),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(visits),
                grid=(pl.cdiv(K, inner), pl.cdiv(N, columns), count),
                in_specs=[spec_SK] + [spec_SN] * len(right),
                out_specs=[spec_out] * len(right),
                scratch_shapes=[pltpu.VMEM((inner, columns), jnp.float32)] * len(right),
            ),
            out_shape=[jax.ShapeDtypeStruct((E, K, N), dtype)] * len(right),
            compiler_params=self._parameters(("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=2 * S * K * N * len(right),
                bytes_accessed=left_SK.dtype.itemsize * S * (K + N * len(right))
                + E * K * N * len(right) * jnp.dtype(dtype).itemsize,
                transcendentals=0,
            ),
            interpret=self.interpret,
            name="grouped_outer",
        )(*visits, left_SK, *right)

    def _part(self, tile: int) -> int:
        return self.tiles.part if tile % self.tiles.part == 0 else tile

    def _parameters(self, semantics):
        return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=blocks.limit())


def _tile(visits, step):
    return look_up(Visits(*visits), "tile", step)


def _expert(visits, step):
    return look_up(Visits(*visits), "expert", step)


class _Dot(NamedTuple):
    """Static facts of a call of `dot`: rows of a part, and how many arrays of each kind."""

    product: grouped.Product
    part: int
    rows: int
    weights: int
    biases: int
    extras: int


def _dot_kernel(call: _Dot, unit, *refs):
    del unit
    refs = list(refs)
    take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
    visits = Visits(*take(len(Visits._fields)))
    rows, weights, biases, extras, outs = map(
        take, (call.rows, call.weights, call.biases, call.extras, call.product.outputs)
    )
    step = pl.program_id(1)
    low, high = (look_up(visits, name, step) for name in ("low", "high"))
    tile = rows[0].shape[0]

    @pl.when((look_up(visits, "first", step) == 1) & (high - low < tile))
    def _():
        for out in outs:
            out[...] = jnp.zeros_like(out)

    def compute(start, size):
        at = pl.ds(start, size)
        products = _products(call, rows, weights, at, refs)
        products = [
            p if not biases else p + biases[index][...].astype(jnp.float32)
            for index, p in enumerate(products)
        ]
        row = start + lax.broadcasted_iota(jnp.int32, (size, outs[0].shape[1]), 0)
        mine = (row >= low) & (row < high)
        values = call.product.finish(products, [x[at].astype(jnp.float32) for x in extras])
        for out, value in zip(outs, values, strict=True):
            out[at] = jnp.where(mine, value, out[at].astype(jnp.float32)).astype(out.dtype)

    _on_least(low, high, tile, call.part, compute)


def _on_least(low, high, tile, part, compute):
    """compute(start, size) on the smallest piece of a tile, of a few sizes, with rows low .. high.

    A product of few rows takes little less time than one of many, because the weights have to be
    moved into the matrix unit all the same: many small pieces would take longer than a large one.
    """
    shift = part.bit_length() - 1
    begin = (low >> shift) << shift
    open_, size = high > low, part
    while size < tile:
        start = pl.multiple_of(jnp.minimum(begin, tile - size), part)
        fits = high - start <= size
        pl.when(open_ & fits)(functools.partial(compute, start, size))
        open_, size = open_ & jnp.logical_not(fits), 2 * size
    pl.when(open_)(functools.partial(compute, 0, tile))


def _products(call: _Dot, rows, weights, at, scratch):
    """float32 products of the rows `at` with each of the weights."""
    K = rows[0].shape[1]
    contract = (1, 1) if call.product.transposed else (1, 0)
    pairs = [(rows[i % len(rows)], weights[i]) for i in range(len(weights))]

    def product(row, weight, columns):
        part = weight[:, columns] if call.product.transposed else weight[columns]
        left = row[at, columns]
        return dot(left, part.astype(left.dtype), contract)

    if K <= CHUNK:
        return [product(row, weight, slice(None)) for row, weight in pairs]
    sums = [x.at[at] for x in scratch]
    for total, (row, weight) in zip(sums, pairs, strict=True):
        total[...] = product(row, weight, pl.ds(0, CHUNK))

    def body(index, _):
        columns = pl.ds(pl.multiple_of(index * CHUNK, CHUNK), CHUNK)
        for total, (row, weight) in zip(sums, pairs, strict=True):
            total[...] += product(row, weight, columns)

    lax.fori_loop(1, K // CHUNK, body, None)
    if rest := K % CHUNK:
        for total, (row, weight) in zip(sums, pairs, strict=True):
            total[...] += product(row, weight, pl.ds(K - rest, rest))
    return [total[...] for total in sums]


def _outer_kernel(part: int, *refs):
    refs = list(refs)
    visits = Visits(*(refs.pop(0) for _ in Visits._fields))
    count = (len(refs) - 1) // 3
    left, right, outs, sums = refs[0], *(refs[1 + i * count :][:count] for i in range(3))
    step = pl.program_id(2)
    low, high = (look_up(visits, name, step) for name in ("low", "high"))
    tile = left.shape[0]

    @pl.when(look_up(visits, "first", step) == 1)
    def _():
        for total in sums:
            total[...] = jnp.zeros_like(total)

    def compute(start, size):
        at = pl.ds(start, size)

        def mine(ref):
            # Of both sides: what lies beyond may be anything, and 0 x NaN is NaN.
            row = start + lax.broadcasted_iota(jnp.int32, (size, ref.shape[1]), 0)
            value = ref[at].astype(jnp.float32)
            return jnp.where((row >= low) & (row < high), value, 0).astype(ref.dtype)

        left_part = mine(left)
        for total, ref in zip(sums, right, strict=True):
            total[...] += dot(left_part, mine(ref), (0, 0))

    _on_least(low, high, tile, part, compute)

    @pl.when(look_up(visits, "last", step) == 1)
    def _():
        for total, out in zip(sums, outs, strict=True):
            out[...] = total[...].astype(out.dtype)


def grouped_mlp(
    rows_SD: jax.Array,
    size_E: jax.Array,
    weights: tuple[jax.Array, ...],
    biases: tuple[jax.Array, ...] = (),
    *,
    clamp: float | None = None,
    unit: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """`ops.experts.grouped_mlp` by Pallas kernels for TPUs.

    Args:
      rows_SD: bfloat16 or float32.
      size_E, weights, biases, clamp, unit: as there.
      interpret: run as plain JAX on any device, for tests; or a simulation of a TPU's memories.
      tiles: how arrays are cut.

    Raises:
      ValueError: a dtype that the kernels do not take, or a D or F for which fast memory has no
        room.
    """
    S, D = rows_SD.shape
    check(S, (D, weights[0].shape[-1]), rows_SD.dtype, weights[0].dtype)
    kernels = Kernels(interpret, tiles or blocks.tiles_for(rows_SD.dtype))
    return grouped.grouped_mlp(kernels, rows_SD, size_E, weights, biases, clamp, unit)
