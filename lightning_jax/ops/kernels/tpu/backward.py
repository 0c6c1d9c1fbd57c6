"""Backward pass of sliding-window attention on a TPU: all gradients in one walk over the queries.

Beside the ring of keys and values lies one of their gradients in float32. A block of keys is done
when the last queries that see it have passed, and is written then; so every array is read or
written once, and probabilities are computed once (five products a pair, against seven in two
walks). They come from the saved log-sum-exp (Dao et al., "FlashAttention", arXiv:2205.14135,
appendix B.4). Tiles of scores have keys as rows: what belongs to a query is then one row.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lightning_jax.ops.kernels.common import LOG2_E, dot
from lightning_jax.ops.kernels.tpu import tiles
from lightning_jax.ops.kernels.tpu.band import Band

# Letters as in `tpu.forward`, but tiles of scores are [P, R].


class _Refs(NamedTuple):
    """What a grid step reads and writes; None for what the call has not."""

    query: Any
    key: Any
    value: Any
    out: Any
    dout: Any
    lse: Any
    query_segments: Any
    key_segments: Any
    dquery: Any
    dkey: Any
    dvalue: Any
    key_ring: Any
    value_ring: Any
    dkey_ring: Any
    dvalue_ring: Any
    dquery_sum: Any
    segment_ring: Any


class _Rows(NamedTuple):
    """What belongs to the queries of one tile; statistics are rows."""

    query_RH: jax.Array
    dout_RH: jax.Array
    lse_1R: jax.Array
    delta_1R: jax.Array
    segments_1R: jax.Array | None


def backward(
    band: Band,
    query_BTX: jax.Array,
    key_BSX: jax.Array,
    value_BSX: jax.Array,
    out_BTX: jax.Array,
    dout_BTX: jax.Array,
    lse_BGST: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of queries, keys and values, each in its array's dtype.

    `out_BTX` and `lse_BGST` are the results of the forward pass, `dout_BTX` is the gradient of the
    output.
    """
    B = query_BTX.shape[0]
    specs = tiles.Specs(band, band.lag)
    rows, keys = specs.queries, specs.keys
    in_specs = [rows, keys, keys, rows, rows, specs.statistics]
    arrays = [query_BTX, key_BSX, value_BSX, out_BTX, dout_BTX, lse_BGST]
    if segments is not None:
        in_specs += [specs.query_segments, specs.key_segments]
        arrays += [x_BT[:, None] for x_BT in segments]
    return pl.pallas_call(
        functools.partial(_kernel, band),
        grid=(B, band.kv_heads // band.kv_step, band.steps + band.lag, band.parts),
        in_specs=in_specs,
        out_specs=[rows, specs.finished_keys, specs.finished_keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3]],
        scratch_shapes=_scratch(band, key_BSX.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=band.vmem_limit(key_BSX.dtype.itemsize, gradients=True),
        ),
        cost_estimate=band.cost(B, 5, [*arrays, *arrays[:3]]),
        interpret=band.interpret,
        name="sliding_window_backward",
    )(*arrays)


def _scratch(band: Band, dtype: Any) -> list[Any]:
    ring = band.ring, band.kv_step * band.head_size
    sums = [ring, ring, (band.blocks.block * band.blocks.stack, band.head_size)]
    segments = [pltpu.VMEM((band.ring, band.statistic_lanes), jnp.int32)] * band.segments
    return [
        *[pltpu.VMEM(ring, dtype)] * 2,
        *(pltpu.VMEM(shape, jnp.float32) for shape in sums),
        *segments,
    ]


def _kernel(band: Band, *refs: Any) -> None:
    refs, step, part = _named(band, list(refs)), pl.program_id(2), pl.program_id(3)

    @pl.when((step < band.steps) & (part == 0))
    def _():
        slot = band.ring_slice(step * band.blocks.block, band.blocks.block)
        refs.key_ring[slot] = refs.key[0]
        refs.value_ring[slot] = refs.value[0]
        for ring in (refs.dkey_ring, refs.dvalue_ring):
            ring[slot] = jnp.zeros((band.blocks.block, ring.shape[1]), jnp.float32)
        if band.segments:
            segments = refs.key_segments[0]
            shape = band.statistic_lanes, band.blocks.block
            refs.segment_ring[slot] = jnp.broadcast_to(segments, shape).T

    for kv, heads in band.stacks:
        call = band, refs, step, kv, heads
        for span, body in ((band.running_steps, _running), (band.folded_steps, _folded)):
            tiles.during(step, span, band.steps + band.lag, functools.partial(body, *call))

    @pl.when((step >= band.lag) & (part == band.parts - 1))
    def _():
        slot = band.ring_slice((step - band.lag) * band.blocks.block, band.blocks.block)
        # The queries of the product carry their factor already.
        factor = band.scale / band.query_factor
        refs.dkey[0] = (refs.dkey_ring[slot] * factor).astype(refs.dkey.dtype)
        refs.dvalue[0] = refs.dvalue_ring[slot].astype(refs.dvalue.dtype)


def _named(band: Band, refs: list[Any]) -> _Refs:
    inputs = [refs.pop(0) for _ in range(6)]
    segments = [refs.pop(0) for _ in range(2)] if band.segments else [None, None]
    return _Refs(*inputs, *segments, *refs, *([] if band.segments else [None]))


def _running(band, refs, step, kv, heads):
    """Any queries: block after block of keys, masked only where the mask can hide something."""
    blocks = band.blocks
    rows = [_rows(band, refs, heads, index) for index in range(blocks.tiles)]

    def visit(index, back, edge):
        """Gradient of the queries of a tile from the block of keys `back` blocks before."""
        dquery_RH = None
        for position in range(blocks.tiles):
            distance = index - position + blocks.tiles * back if edge else None
            if distance is None or (distance >= 0 and band.sees(distance)):
                key = (step - back) * blocks.block + position * blocks.tile
                pair = _pair(band, refs, kv, rows[index], key)
                scores_PR = tiles.hide(band, pair.scores_PR, distance, 1)
                weights_PR, dscores_PR = _gradients(rows[index], pair, scores_PR)
                part_RH = _add(band, refs, kv, rows[index], key, weights_PR, dscores_PR)
                dquery_RH = part_RH if dquery_RH is None else dquery_RH + part_RH
        return dquery_RH

    def revisit(back, edge):
        for index in range(blocks.tiles):
            dquery_RH = visit(index, back, edge)
            if dquery_RH is not None:
                refs.dquery_sum[tiles.stack_rows(band, index)] += dquery_RH

    dqueries: list[Any] = [visit(index, 0, True) for index in range(blocks.tiles)]
    if band.interior_blocks or band.edge_blocks:
        for index, dquery_RH in enumerate(dqueries):
            refs.dquery_sum[tiles.stack_rows(band, index)] = dquery_RH
        count = jnp.minimum(step, band.interior_blocks)
        lax.fori_loop(0, count, lambda back, _: revisit(back + 1, False), None)
        for back in band.edge_blocks:
            pl.when(step >= back)(functools.partial(revisit, back, True))
        dqueries = [refs.dquery_sum[tiles.stack_rows(band, i)] for i in range(blocks.tiles)]
    _finish(band, refs, heads, dqueries)


def _folded(band, refs, step, kv, heads):
    """Queries with full windows: the two ends of each window are one tile of scores."""
    blocks, interior, first = band.blocks, band.folded_interior, band.folded_first
    near_PR = tiles.offset(band, 1) >= 0
    rows = [_rows(band, refs, heads, index) for index in range(blocks.tiles)]

    def key(index, distance):
        return step * blocks.block + (index - distance) * blocks.tile

    def whole(index, distance):
        pair = _pair(band, refs, kv, rows[index], key(index, distance))
        gradients = _gradients(rows[index], pair, pair.scores_PR)
        return _add(band, refs, kv, rows[index], key(index, distance), *gradients)

    def ends(index):
        ends = key(index, 0), key(index, interior + 1)
        near, far = (_pair(band, refs, kv, rows[index], end) for end in ends)
        pair = _Pair._make(
            None if x is None or y is None else jnp.where(near_PR, x, y)
            for x, y in zip(near, far, strict=True)
        )
        gradients = _gradients(rows[index], pair, pair.scores_PR)
        nears = [x_PR * near_PR.astype(jnp.float32) for x_PR in gradients]
        fars = [x_PR - y_PR for x_PR, y_PR in zip(gradients, nears, strict=True)]
        return _add(band, refs, kv, rows[index], ends[0], *nears) + _add(
            band, refs, kv, rows[index], ends[1], *fars
        )

    def first_visit(index):
        return ends(index) + sum(whole(index, distance) for distance in range(1, first + 1))

    dqueries = [first_visit(index) for index in range(blocks.tiles)]
    if interior > first:
        for index, dquery_RH in enumerate(dqueries):
            refs.dquery_sum[tiles.stack_rows(band, index)] = dquery_RH

        def loop(turn, _):
            start = first + 1 + turn * blocks.visit
            for index in range(blocks.tiles):
                dquery_RH = sum(whole(index, start + more) for more in range(blocks.visit))
                refs.dquery_sum[tiles.stack_rows(band, index)] += dquery_RH

        lax.fori_loop(0, (interior - first) // blocks.visit, loop, None)
        dqueries = [refs.dquery_sum[tiles.stack_rows(band, i)] for i in range(blocks.tiles)]
    _finish(band, refs, heads, dqueries)


class _Pair(NamedTuple):
    """Of a tile of queries and one of keys: base-2 scores (hidden where segments differ), products
    of output gradients and values, and the slope of the soft-cap."""

    scores_PR: jax.Array
    products_PR: jax.Array
    slope_PR: jax.Array | None


def _pair(band: Band, refs: _Refs, kv: int, rows: _Rows, key: jax.Array) -> _Pair:
    slot, lanes = band.ring_slice(key, band.blocks.tile), band.head_lanes(kv)
    scores_PR = dot(refs.key_ring[slot, lanes], rows.query_RH, (1, 1))
    products_PR = dot(refs.value_ring[slot, lanes], rows.dout_RH, (1, 1))
    slope_PR = None
    if band.softcap is not None:
        bounded_PR = jnp.tanh(scores_PR)
        slope_PR = 1.0 - bounded_PR * bounded_PR
        scores_PR = band.softcap * LOG2_E * bounded_PR
    if band.segments:
        key_PR = tiles.widen(refs.segment_ring[slot], scores_PR.shape[1])
        scores_PR = tiles.hide_unless(key_PR == rows.segments_1R, scores_PR)
    return _Pair(scores_PR, products_PR, slope_PR)


def _gradients(rows: _Rows, pair: _Pair, scores_PR: jax.Array):
    """Weights, and gradients of the scores (or of what the soft-cap bounds)."""
    weights_PR = jnp.exp2(scores_PR - rows.lse_1R)
    dscores_PR = weights_PR * (pair.products_PR - rows.delta_1R)
    if pair.slope_PR is not None:
        dscores_PR *= pair.slope_PR
    return weights_PR, dscores_PR


def _add(band, refs, kv, rows, key, weights_PR, dscores_PR):
    """Adds to the gradients of keys and values; returns the part of the queries' gradient."""
    slot, lanes = band.ring_slice(key, band.blocks.tile), band.head_lanes(kv)
    dtype = rows.query_RH.dtype
    weights_PR, dscores_PR = weights_PR.astype(dtype), dscores_PR.astype(dtype)
    refs.dvalue_ring[slot, lanes] += dot(weights_PR, rows.dout_RH, (1, 0))
    refs.dkey_ring[slot, lanes] += dot(dscores_PR, rows.query_RH, (1, 0))
    return dot(dscores_PR, refs.key_ring[slot, lanes], (0, 0))


def _rows(band: Band, refs: _Refs, heads: list[int], index: int) -> _Rows:
    query_RH, out_RH, dout_RH = (
        tiles.stacked(band, ref, heads, index) for ref in (refs.query, refs.out, refs.dout)
    )
    at = tiles.positions(band, index)
    products_RH = out_RH.astype(jnp.float32) * dout_RH.astype(jnp.float32)
    lse_1R = jnp.concatenate([refs.lse[0, 0, head, at][None] for head in heads], axis=1)
    segments_1R = None
    if band.segments:
        segments_1P = refs.query_segments[0, :, at]
        segments_1P = jnp.where(segments_1P == 0, -1, segments_1P)
        segments_1R = jnp.concatenate([segments_1P] * band.blocks.stack, axis=1)
    return _Rows(
        (query_RH.astype(jnp.float32) * band.query_factor).astype(query_RH.dtype),
        dout_RH,
        lse_1R,
        jnp.sum(products_RH.T, axis=0, keepdims=True),
        segments_1R,
    )


def _finish(band: Band, refs: _Refs, heads: list[int], dqueries: list[jax.Array]) -> None:
    for index, dquery_RH in enumerate(dqueries):
        dquery_RH = (dquery_RH * band.scale).astype(refs.dquery.dtype)
        tiles.write_stacked(band, refs.dquery, heads, index, dquery_RH)
