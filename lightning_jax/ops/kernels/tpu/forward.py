"""Forward pass of sliding-window attention on a TPU.

A grid step takes a block of keys and values, which join a ring in fast memory, and the queries at
the same place of the row, if any. The ring holds all that they can see, so every key is read once
and no index is looked up. Tiles of queries run interleaved: while one waits for its products
another takes its exponentials. The running softmax is Milakov & Gimelshein, arXiv:1805.02867, in
base 2 with the scale folded into the queries.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lightning_jax.ops.kernels.common import FLOOR, LOG2_E, dot
from lightning_jax.ops.kernels.tpu import tiles
from lightning_jax.ops.kernels.tpu.band import Band

# Axes of this module besides the usual ones: X heads side by side in the lanes (N x H or K x H),
# R rows of a tile (query heads of a stack x query positions), P keys of a tile, W lanes of a
# statistic of a row, which is the same in all of them.


class _Refs(NamedTuple):
    """What a grid step reads and writes; None for what the call has not."""

    query: Any
    key: Any
    value: Any
    query_segments: Any
    key_segments: Any
    sinks: Any
    out: Any
    lse: Any
    key_ring: Any
    value_ring: Any
    segment_ring: Any
    top: Any
    total: Any
    sum: Any


class _Rows(NamedTuple):
    """The queries of one tile, and their segments repeated for every key of a tile."""

    query_RH: jax.Array
    segments_RP: jax.Array | None


class _State(NamedTuple):
    """A running softmax: maximum (base 2), sum of weights by lane, sum of weighted values."""

    top_RW: jax.Array
    total_RW: jax.Array
    sum_RH: jax.Array


def forward(
    band: Band,
    query_BTX: jax.Array,
    key_BSX: jax.Array,
    value_BSX: jax.Array,
    sinks_N: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns out_BTX in the queries' dtype and the base-2 log-sum-exp lse_BGST (float32).

    The log-sum-exp of a query that sees nothing is 0, or the sink; its output is 0. Axes G and S of
    the log-sum-exp are groups of heads of a grid step and heads of a group.
    """
    B, T = query_BTX.shape[:2]
    specs = tiles.Specs(band)
    in_specs, arrays = [specs.queries, specs.keys, specs.keys], [query_BTX, key_BSX, value_BSX]
    if segments is not None:
        in_specs += [specs.query_segments, specs.key_segments]
        arrays += [x_BT[:, None] for x_BT in segments]
    if sinks_N is not None:
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
        arrays.append(sinks_N.astype(jnp.float32))
    statistics = (B, band.heads_steps, band.heads_step, T)
    return pl.pallas_call(
        functools.partial(_kernel, band),
        grid=(B, band.kv_heads // band.kv_step, band.steps, band.parts),
        in_specs=in_specs,
        out_specs=[specs.queries, specs.statistics],
        out_shape=[
            jax.ShapeDtypeStruct(query_BTX.shape, query_BTX.dtype),
            jax.ShapeDtypeStruct(statistics, jnp.float32),
        ],
        scratch_shapes=_scratch(band, key_BSX.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=band.vmem_limit(key_BSX.dtype.itemsize, gradients=False),
        ),
        cost_estimate=band.cost(B, 2, [*arrays, query_BTX]),
        interpret=band.interpret,
        name="sliding_window_forward",
    )(*arrays)


def _scratch(band: Band, dtype: Any) -> list[Any]:
    blocks = band.blocks
    rows = blocks.block * blocks.stack
    ring = pltpu.VMEM((band.ring, band.kv_step * band.head_size), dtype)
    segments = [pltpu.VMEM((1, band.ring), jnp.int32)] if band.segments else []
    shapes = [(rows, band.statistic_lanes)] * 2 + [(rows, band.head_size)]
    return [ring, ring, *segments, *(pltpu.VMEM(shape, jnp.float32) for shape in shapes)]


def _kernel(band: Band, *refs: Any) -> None:
    # Interpreted, the grid indices are known here only, not inside a branch.
    step, first_head = pl.program_id(2), tiles.first_head(band)
    refs = _named(band, list(refs))

    @pl.when(pl.program_id(3) == 0)
    def _():
        slot = band.ring_slice(step * band.blocks.block, band.blocks.block)
        refs.key_ring[slot] = refs.key[0]
        refs.value_ring[slot] = refs.value[0]
        if band.segments:
            refs.segment_ring[:, slot] = refs.key_segments[0]

    for kv, heads in band.stacks:
        call = band, refs, step, first_head, kv, heads
        for span, body in ((band.running_steps, _running), (band.folded_steps, _folded)):
            tiles.during(step, span, band.steps, functools.partial(body, *call))


def _named(band: Band, refs: list[Any]) -> _Refs:
    query, key, value = (refs.pop(0) for _ in range(3))
    of_query, of_key = [refs.pop(0) for _ in range(2)] if band.segments else [None, None]
    sinks = refs.pop(0) if band.sinks else None
    out, lse, key_ring, value_ring = (refs.pop(0) for _ in range(4))
    ring = refs.pop(0) if band.segments else None
    return _Refs(
        query, key, value, of_query, of_key, sinks, out, lse, key_ring, value_ring, ring, *refs
    )


def _running(band, refs, step, first_head, kv, heads):
    """Any queries: block after block of keys, masked only where the mask can hide something."""
    blocks = band.blocks
    rows = [_rows(band, refs, heads, index) for index in range(blocks.tiles)]

    def visit(index, state, back, edge):
        """Shows the tile of queries `index` the block of keys that lies `back` blocks before."""
        scores, values = [], []
        for position in range(blocks.tiles):
            distance = index - position + blocks.tiles * back if edge else None
            if distance is None or (distance >= 0 and band.sees(distance)):
                key = (step - back) * blocks.block + position * blocks.tile
                score_RP = _scores(band, refs, kv, rows[index], key)
                scores.append(tiles.hide(band, score_RP, distance, 0))
                values.append(_values(band, refs, kv, key))
        return _update(band, state, scores, values)

    def revisit(back, edge):
        for index in range(blocks.tiles):
            _save(band, refs, index, visit(index, _load(band, refs, index), back, edge))

    states = [visit(index, None, 0, True) for index in range(blocks.tiles)]
    if band.interior_blocks or band.edge_blocks:
        for index, state in enumerate(states):
            _save(band, refs, index, state)
        count = jnp.minimum(step, band.interior_blocks)
        lax.fori_loop(0, count, lambda back, _: revisit(back + 1, False), None)
        for back in band.edge_blocks:
            pl.when(step >= back)(functools.partial(revisit, back, True))
        states = [_load(band, refs, index) for index in range(blocks.tiles)]
    for index, state in enumerate(states):
        _finish(band, refs, first_head, heads, index, state)


def _folded(band, refs, step, first_head, kv, heads):
    """Queries with full windows: the two ends of each window are one tile of scores."""
    blocks, interior, first = band.blocks, band.folded_interior, band.folded_first
    near_RP = tiles.offset(band, 0) >= 0
    rows = [_rows(band, refs, heads, index) for index in range(blocks.tiles)]

    def start(index):
        return step * blocks.block + index * blocks.tile

    def visit(index, state, distances):
        keys = [start(index) - distance * blocks.tile for distance in distances]
        scores = [_scores(band, refs, kv, rows[index], key) for key in keys]
        return _update(band, state, scores, [_values(band, refs, kv, key) for key in keys])

    def first_visit(index):
        keys = [start(index) - distance * blocks.tile for distance in (0, interior + 1)]
        keys += [start(index) - distance * blocks.tile for distance in range(1, first + 1)]
        near, far, *rest = (_scores(band, refs, kv, rows[index], key) for key in keys)
        scores = [jnp.where(near_RP, near, far), *rest]
        return _update(
            band, None, scores, [_values(band, refs, kv, key) for key in keys], fold=near_RP
        )

    states: list[Any] = [first_visit(index) for index in range(blocks.tiles)]
    if interior > first:
        for index, state in enumerate(states):
            _save(band, refs, index, state)

        def loop(turn, _):
            distances = [first + 1 + turn * blocks.visit + more for more in range(blocks.visit)]
            for index in range(blocks.tiles):
                _save(band, refs, index, visit(index, _load(band, refs, index), distances))

        lax.fori_loop(0, (interior - first) // blocks.visit, loop, None)
        states = [_load(band, refs, index) for index in range(blocks.tiles)]
    for index, state in enumerate(states):
        _finish(band, refs, first_head, heads, index, state)


def _rows(band: Band, refs: _Refs, heads: list[int], index: int) -> _Rows:
    query_RH = tiles.stacked(band, refs.query, heads, index).astype(jnp.float32)
    query_RH = (query_RH * band.query_factor).astype(refs.query.dtype)
    if not band.segments:
        return _Rows(query_RH, None)
    segments_1P = refs.query_segments[0, :, tiles.positions(band, index)]
    # Queries of padding match nothing: keys of padding have segment 0.
    segments_1P = jnp.where(segments_1P == 0, -1, segments_1P)
    segments_PP = jnp.broadcast_to(segments_1P, (band.blocks.tile, band.blocks.tile)).T
    return _Rows(query_RH, jnp.concatenate([segments_PP] * band.blocks.stack))


def _scores(band: Band, refs: _Refs, kv: int, rows: _Rows, key: jax.Array) -> jax.Array:
    """Base-2 scores of a tile of keys, those of other segments hidden."""
    slot = band.ring_slice(key, band.blocks.tile)
    scores_RP = dot(rows.query_RH, refs.key_ring[slot, band.head_lanes(kv)], (1, 1))
    if band.softcap is not None:
        scores_RP = band.softcap * LOG2_E * jnp.tanh(scores_RP)
    if band.segments:
        scores_RP = tiles.hide_unless(rows.segments_RP == refs.segment_ring[:, slot], scores_RP)
    return scores_RP


def _values(band: Band, refs: _Refs, kv: int, key: jax.Array) -> jax.Array:
    return refs.value_ring[band.ring_slice(key, band.blocks.tile), band.head_lanes(kv)]


def _update(band, state, scores, values, fold=None):
    """Adds tiles of keys to a running softmax, None for an empty one.

    `fold` says which scores of the first tile belong to the first values, the others to the second.
    """
    if not scores:
        return state
    top_RW = _over_lanes(band, jnp.maximum, jnp.max, scores)
    if state is not None:
        top_RW = jnp.maximum(state.top_RW, top_RW)
    elif band.segments:
        top_RW = jnp.maximum(top_RW, FLOOR)
    top_RP = tiles.widen(top_RW, band.blocks.tile)
    weights = [jnp.exp2(score_RP - top_RP) for score_RP in scores]
    total_RW = _by_lane(band, jnp.add, weights)
    if fold is not None:
        # By products: a selection here is fused into the matrix product, which v5e cannot do.
        near_RP = weights[0] * fold.astype(jnp.float32)
        weights[:1] = [near_RP, weights[0] - near_RP]
    sum_RH: Any = sum(
        dot(weight_RP.astype(value_PH.dtype), value_PH, (1, 0))
        for weight_RP, value_PH in zip(weights, values, strict=True)
    )
    if state is None:
        return _State(top_RW, total_RW, sum_RH)
    decay_RW = jnp.exp2(state.top_RW - top_RW)
    sum_RH += tiles.widen(decay_RW, band.head_size) * state.sum_RH
    return _State(top_RW, total_RW + decay_RW * state.total_RW, sum_RH)


def _by_lane(band, operator, arrays):
    """Combines the lanes of tiles that lie a register's width apart: [R, W] of many [R, P]."""
    W = band.statistic_lanes
    return functools.reduce(
        operator, [x[:, at : at + W] for x in arrays for at in range(0, x.shape[1], W)]
    )


def _over_lanes(band, operator, reduce, arrays):
    x_RW = _by_lane(band, operator, arrays)
    return jnp.broadcast_to(reduce(x_RW, axis=1, keepdims=True), x_RW.shape)


def _finish(band, refs, first_head, heads, index, state):
    """Divides by the sum of the weights, adds the sinks; writes output and log-sum-exp."""
    top_RW, sum_RH = state.top_RW, state.sum_RH
    total_RW = _over_lanes(band, jnp.add, jnp.sum, [state.total_RW])
    tile = band.blocks.tile
    if band.sinks:
        sinks = [jnp.full((tile, 1), refs.sinks[first_head + head] * LOG2_E) for head in heads]
        sinks_RW = jnp.broadcast_to(jnp.concatenate(sinks), top_RW.shape)
        new_top_RW = jnp.maximum(top_RW, sinks_RW)
        decay_RW = jnp.exp2(top_RW - new_top_RW)
        total_RW = decay_RW * total_RW + jnp.exp2(sinks_RW - new_top_RW)
        sum_RH = tiles.widen(decay_RW, band.head_size) * sum_RH
        top_RW = new_top_RW
    lse_RW = top_RW + jnp.log2(total_RW)
    if band.segments:
        seen_RW = total_RW > 0
        total_RW, lse_RW = jnp.where(seen_RW, total_RW, 1.0), jnp.where(seen_RW, lse_RW, 0.0)
    out_RH = (sum_RH * tiles.widen(1.0 / total_RW, band.head_size)).astype(refs.out.dtype)
    tiles.write_stacked(band, refs.out, heads, index, out_RH)
    for place, head in enumerate(heads):
        lse_WP = lse_RW[place * tile : (place + 1) * tile].T
        refs.lse[0, 0, head, tiles.positions(band, index)] = lse_WP[0]


def _save(band: Band, refs: _Refs, index: int, state: _State) -> None:
    rows = tiles.stack_rows(band, index)
    refs.top[rows], refs.total[rows], refs.sum[rows] = state


def _load(band: Band, refs: _Refs, index: int) -> _State:
    rows = tiles.stack_rows(band, index)
    return _State(refs.top[rows], refs.total[rows], refs.sum[rows])
