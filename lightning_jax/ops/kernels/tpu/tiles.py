"""What the passes of the TPU attention kernel share: blocks of arrays, and arithmetic on tiles."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lightning_jax.ops.kernels.common import HIDDEN
from lightning_jax.ops.kernels.tpu.band import Band

# Letters as in `tpu.forward`. The grid is (batch, key/value heads of a step, block of the row, part
# of the query heads); the last axis is the fastest, so keys and values stay while parts pass.


class Specs:
    """Which blocks of its arrays a grid step sees."""

    def __init__(self, band: Band, lag: int = 0):
        """`lag`: by how many blocks finished keys lag behind the queries; the grid has as many
        steps more, which only finish keys.

        Steps without queries of their own map to the first or the last query block, so nothing is
        copied. They must: revisiting an output block after leaving it makes Pallas write back a
        stale buffer.
        """
        block, parts, lead, last = band.blocks.block, band.parts, band.lead, band.steps - 1
        lanes, kv_lanes = (x * band.head_size for x in (band.heads_step, band.kv_step))

        def keys(t):
            return jnp.minimum(t, last) if lag else t

        def rows(t):
            return jnp.maximum(keys(t) - lead, 0) if lead else keys(t)

        def heads(k, t, p):
            if parts == 1:
                return k
            p = jnp.where(t < lead, 0, p) if lead else p
            return k * parts + (jnp.where(t > last, parts - 1, p) if lag else p)

        def finished(t):
            return jnp.maximum(t - lag, 0) if lag else t

        spec = pl.BlockSpec
        self.queries = spec((1, block, lanes), lambda b, k, t, p: (b, rows(t), heads(k, t, p)))
        self.statistics = spec(
            (1, 1, band.heads_step, block), lambda b, k, t, p: (b, heads(k, t, p), 0, rows(t))
        )
        self.query_segments = spec((1, 1, block), lambda b, k, t, p: (b, 0, rows(t)))
        self.keys = spec((1, block, kv_lanes), lambda b, k, t, p: (b, keys(t), k))
        self.key_segments = spec((1, 1, block), lambda b, k, t, p: (b, 0, keys(t)))
        self.finished_keys = spec((1, block, kv_lanes), lambda b, k, t, p: (b, finished(t), k))


def during(step: jax.Array, span: range, total: int, body: Callable[[], None]) -> None:
    """Runs `body` in the grid steps of a span, out of `total`."""
    if not span:
        return
    bounds = [step >= span.start] * (span.start > 0) + [step < span.stop] * (span.stop < total)
    if bounds:
        pl.when(functools.reduce(operator.and_, bounds))(body)
    else:
        body()


def offset(band: Band, query_axis: int) -> jax.Array:
    """int32, query position minus key position within a tile; [R, P], or [P, R] for axis 1."""
    tile = band.blocks.tile
    shape = [tile, tile]
    shape[query_axis] *= band.blocks.stack
    query, key = (
        lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (query_axis, 1 - query_axis)
    )
    return lax.bitwise_and(query, tile - 1) - key


def hide(band: Band, scores: jax.Array, distance: int | None, query_axis: int) -> jax.Array:
    """Hides what the band hides between two tiles `distance` tiles apart, None for nothing."""
    if distance is None:
        return scores
    if distance == 0:
        scores = hide_unless(offset(band, query_axis) >= 0, scores)
    if band.cut(distance):
        reach = band.window - distance * band.blocks.tile
        scores = hide_unless(offset(band, query_axis) < reach, scores)
    return scores


def hide_unless(visible: jax.Array, scores: jax.Array) -> jax.Array:
    """Scores with all but the visible ones hidden."""
    return jnp.where(visible, scores, HIDDEN)


def widen(x_RW: jax.Array, lanes: int) -> jax.Array:
    """A statistic in as many lanes as asked for."""
    W = x_RW.shape[1]
    if lanes <= W:
        return x_RW[:, :lanes]
    return jnp.concatenate([x_RW] * (lanes // W), axis=1)


def positions(band: Band, index: int) -> pl.Slice | slice:
    """The query positions of a tile within its block."""
    return pl.ds(index * band.blocks.tile, band.blocks.tile)


def stack_rows(band: Band, index: int) -> pl.Slice | slice:
    """The rows of a tile in an array that holds all tiles of a stack of heads."""
    rows = band.blocks.tile * band.blocks.stack
    return pl.ds(index * rows, rows)


def first_head(band: Band) -> jax.Array:
    """Number of the first query head of the grid step."""
    return (pl.program_id(1) * band.parts + pl.program_id(3)) * band.heads_step


def stacked(band: Band, ref: Any, heads: list[int], index: int) -> jax.Array:
    """x_RH: a tile of some heads of a block of queries, one below the other."""
    at = positions(band, index)
    return jnp.concatenate([ref[0, at, band.head_lanes(head)] for head in heads])


def write_stacked(band: Band, ref: Any, heads: list[int], index: int, x_RH: jax.Array) -> None:
    """The inverse of `stacked`."""
    tile = band.blocks.tile
    for place, head in enumerate(heads):
        x_TH = x_RH[place * tile : (place + 1) * tile]
        ref[0, positions(band, index), band.head_lanes(head)] = x_TH
