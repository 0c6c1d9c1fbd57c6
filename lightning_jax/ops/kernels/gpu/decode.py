"""Attention of one or few queries over a cache on GPUs, in Pallas Triton: rings and pages.

A program takes one key/value head with all its query heads, and one share of the positions that the
row's queries can see; it looks up where each position is stored, so nothing outside the window is
read, whatever the size of the cache. The shares are then combined by their maxima and sums (Dao et
al., "Flash-Decoding", 2023). Pages are those of PagedAttention (Kwon et al., arXiv:2309.06180).

Letters besides the usual ones: R rows of a program, which are the queries of a key head in the
order (time, head of the group); J pages of a row; X slots of the pool of pages; C shares.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from lightning_jax.ops.kernels import common
from lightning_jax.ops.kernels.common import FLOOR, HIDDEN, LOG2_E, UNBOUNDED, dot
from lightning_jax.ops.kernels.gpu.forward import Scores, normalise, rows, store_rows

MAX_ROWS = 128
# Two programs for each of the 132 multiprocessors of a Hopper GPU.
_PROGRAMS = 264


@dataclasses.dataclass(frozen=True)
class DecodeTile:
    """Keys per step, warps and pipeline stages of the decode kernel."""

    key: int
    warps: int
    stages: int


# By head size: a step's keys and values, times the stages, stay within 64 KiB.
_TILES = {64: DecodeTile(64, 4, 4), 128: DecodeTile(64, 4, 2), 256: DecodeTile(32, 4, 2)}


class _Static(NamedTuple):
    """What the kernel is specialised to."""

    window: int
    page: int
    rows: int
    shares: int
    scores: Scores
    tile: DecodeTile


def fits(query_BTNH: jax.Array, key_BSKH: jax.Array) -> bool:
    """Whether `ring_decode` takes so many queries, and heads of that size."""
    _, T, N, H = query_BTNH.shape
    return T * N // key_BSKH.shape[-2] <= MAX_ROWS and H in common.TRITON_HEAD_SIZES


def ring_decode(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    unit: jax.Array | None = None,
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    window: int | None,
    query_segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    key_scales_BSK: jax.Array | None = None,
    value_scales_BSK: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    scale: float,
    logit_softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of few queries to a cache where position p lies in slot p % S, theirs included.

    For NVIDIA GPUs from Ampere on; not differentiable. The result is that of the dense mask over
    all slots, of which only those for positions inside some query's window are read. To answer T
    queries a ring needs window + T - 1 slots, since it must still hold what the first one sees.

    Args:
        query_BTNH: queries, few: T x N / K is at most 128.
        key_BSKH: cached keys in the queries' dtype, or int8 with `key_scales_BSK`.
        value_BSKH: cached values, likewise.
        unit: int32 below U, the one of U caches that is read, in place: keys, values and scales
            then lead with an axis U, and all U units share the slots' positions and segments.
        query_positions_BT: int32 position of each query; negative ones see nothing.
        key_positions_BS: int32 position that each slot holds; `EMPTY_POSITION` if none.
        window: visible keys per query, self included; None for all.
        query_segments_BT: int32 document of each query; 0 sees nothing. None with
            `key_segments_BS` means that positions alone decide.
        key_segments_BS: document of the token in each slot, 0 for none.
        key_scales_BSK: float32 factor of each int8 key vector.
        value_scales_BSK: float32 factor of each int8 value vector.
        sinks_N: per head logit that joins the softmax denominator only.
        scale: factor of the scores, positive.
        logit_softcap: c in c x tanh(logit / c); None: no soft-cap.
        interpret: run as plain JAX on any device, for tests.

    Returns:
        out_BTNH in the dtype of the queries; exactly 0 where a query sees nothing.

    Raises:
        ValueError: more queries, another dtype or another sign than the kernel can honour.
    """
    common.check_stack("GPU decode", key_BSKH, unit)
    B, S = key_BSKH.shape[-4:-2]
    if query_segments_BT is not None:
        query_positions_BT = jnp.where(query_segments_BT == 0, -1, query_positions_BT)
    stored = [
        None if x is None else jnp.broadcast_to(x, (B, S))
        for x in (key_positions_BS, key_segments_BS)
    ]
    # A ring is the one page of its row, into which all positions are folded.
    pages_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    cache = [key_BSKH, value_BSKH, key_scales_BSK, value_scales_BSK]
    if unit is not None:
        pages_B1 += unit * B
        cache = [None if x is None else x.reshape(-1, *x.shape[2:]) for x in cache]
    return _decode(
        query_BTNH,
        cache,
        query_positions_BT,
        query_segments_BT,
        pages_B1,
        stored,
        sinks_N,
        (window, scale, logit_softcap, interpret),
    )


def paged_decode(
    query_BTNH: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    *,
    query_positions_BT: jax.Array,
    pages_BJ: jax.Array,
    window: int | None = None,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    scale: float,
    logit_softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of few queries to a pool of pages that holds all their earlier tokens, and them.

    For NVIDIA GPUs from Ampere on; not differentiable. With a window only the pages inside it are
    looked up and read.

    Args:
        query_BTNH: queries, few: T x N / K is at most 128.
        key_pages: [pages, page size, K, H] in the queries' dtype, or int8 with `key_scales`.
        value_pages: the same for values.
        query_positions_BT: int32 position of each query in its row; negative ones see nothing.
        pages_BJ: int32, page that holds positions j x page size and following of row b. Entries
            that no query can see are not read.
        window: visible keys per query, self included; None for all.
        key_scales: float32 [pages, page size, K], factor of each int8 key vector.
        value_scales: the same for values.
        sinks_N: per head logit that joins the softmax denominator only.
        scale: factor of the scores, positive.
        logit_softcap: c in c x tanh(logit / c); None: no soft-cap.
        interpret: run as plain JAX on any device, for tests.

    Returns:
        out_BTNH in the dtype of the queries; exactly 0 where a query sees nothing.

    Raises:
        ValueError: more queries, another dtype or another sign than the kernel can honour.
    """
    return _decode(
        query_BTNH,
        (key_pages, value_pages, key_scales, value_scales),
        query_positions_BT,
        None,
        pages_BJ,
        (None, None),
        sinks_N,
        (window, scale, logit_softcap, interpret),
    )


def _decode(query_BTNH, cache, positions_BT, segments_BT, pages_BJ, stored, sinks_N, options):
    """Both caches as one pool of pages; `stored` are position and segment of a ring's slots."""
    window, scale, logit_softcap, interpret = options
    _check(query_BTNH, *cache, scale=scale, logit_softcap=logit_softcap)
    cap = None if logit_softcap is None else float(logit_softcap)
    B, T, N, H = query_BTNH.shape
    page, K = cache[0].shape[1:3]
    G, tile = N // K, _TILES[max(64, H)]
    if cache[0].dtype.itemsize > 2:
        tile = dataclasses.replace(tile, stages=1)
    capacity = pages_BJ.shape[1] * page
    span = capacity if window is None else min(capacity, window + T - 1)
    static = _Static(
        window=UNBOUNDED if window is None else window,
        page=page,
        rows=max(16, pl.next_power_of_2(T * G)),
        # A share of less than two steps would cost more to combine than to compute.
        shares=max(1, min(-(-_PROGRAMS // (B * K)), span // (2 * tile.key))),
        scores=Scores(float(scale), cap, interpret),
        tile=tile,
    )
    query_BKRH = query_BTNH.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
    per_query = [
        None if x is None else jnp.repeat(jnp.broadcast_to(x, (B, T)), G, axis=1)
        for x in (positions_BT, segments_BT)
    ]
    pool = [None if x is None else x.reshape(-1, *x.shape[2:]) for x in cache]
    bounds_B2 = _bounds(jnp.broadcast_to(positions_BT, (B, T)), static.window)
    partial = _shares(static, query_BKRH, bounds_B2, *per_query, pages_BJ, *stored, *pool)
    out_BKRH = _combine(*partial, sinks_N=sinks_N)
    out_BTKGH = out_BKRH.reshape(B, K, T, G, H).swapaxes(1, 2)
    return out_BTKGH.reshape(B, T, N, H).astype(query_BTNH.dtype)


def _bounds(query_positions_BT, window):
    """First position that a row's queries see, and the one after the last; equal if none."""
    active_BT = query_positions_BT >= 0
    after_B = jnp.max(jnp.where(active_BT, query_positions_BT + 1, 0), axis=1)
    first_B = jnp.min(jnp.where(active_BT, query_positions_BT, after_B[:, None]), axis=1)
    first_B = jnp.where(jnp.any(active_BT, axis=1), jnp.maximum(first_B - window + 1, 0), after_B)
    return jnp.stack([first_B, after_B], axis=1).astype(jnp.int32)


def _shares(static, query_BKRH, bounds_B2, positions_BR, segments_BR, pages_BJ, *stored_and_pool):
    """Unnormalised sums [B, K, C, R, H], and maxima in base 2 and totals [B, K, C, R]."""
    B, K, R, H = query_BKRH.shape
    stored, pool = stored_and_pool[:2], stored_and_pool[2:]
    C = static.shares

    def per_row(array_BX):
        if array_BX is None:
            return None
        return pl.BlockSpec((None, array_BX.shape[1]), lambda c, k, b: (b, 0))

    def of_head(array):
        if array is None:
            return None
        trailing = array.shape[2:]
        index = (0,) * len(trailing)
        return pl.BlockSpec((array.shape[0], None, *trailing), lambda c, k, b: (0, k, *index))

    statistic = pl.BlockSpec((None, None, None, R), lambda c, k, b: (b, k, c, 0))
    return pl.pallas_call(
        functools.partial(_kernel, static=static),
        grid=(C, K, B),
        in_specs=[
            pl.BlockSpec((None, None, R, H), lambda c, k, b: (b, k, 0, 0)),
            *map(per_row, (bounds_B2, positions_BR, segments_BR, pages_BJ, *stored)),
            *map(of_head, pool),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, R, H), lambda c, k, b: (b, k, c, 0, 0)),
            statistic,
            statistic,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, C, R, H), jnp.float32),
            *[jax.ShapeDtypeStruct((B, K, C, R), jnp.float32)] * 2,
        ],
        compiler_params=plt.CompilerParams(
            num_warps=static.tile.warps, num_stages=static.tile.stages
        ),
        interpret=static.scores.interpret,
        name="decode_attention",
    )(query_BKRH, bounds_B2, positions_BR, segments_BR, pages_BJ, *stored_and_pool)


def _kernel(
    query_ref,
    bounds_ref,
    positions_ref,
    segments_ref,
    pages_ref,
    stored_position_ref,
    stored_segment_ref,
    key_ref,
    value_ref,
    key_scale_ref,
    value_scale_ref,
    sum_ref,
    top_ref,
    total_ref,
    *,
    static: _Static,
):
    R, S, count = static.rows, static.tile.key, query_ref.shape[0]
    scores, dtype = static.scores, query_ref.dtype
    query_RH = rows(query_ref, 0, R, count)
    # Rows that only fill up the tile have no position, and so see nothing.
    real_R = jnp.arange(R) < count
    position_R = plt.load(positions_ref.at[pl.ds(0, R)], mask=real_R, other=-1)
    segment_R = None if segments_ref is None else rows(segments_ref, 0, R, count)
    stored = stored_position_ref, stored_segment_ref
    start, end = _share(bounds_ref, static)

    def visit(index, state):
        top_R, total_R, sum_RH = state
        position_S = start + index * S + jnp.arange(S)
        # Past the end the last key is read again, and hidden.
        slot_S, place_S = _slots_of(jnp.minimum(position_S, end - 1), pages_ref, static)
        product_RS = dot(query_RH, key_ref[slot_S].astype(dtype), (1, 1))
        if key_scale_ref is not None:
            product_RS *= key_scale_ref[slot_S][None]
        seen_RS = _seen(position_R, segment_R, position_S, place_S, static.window, *stored)
        seen_RS &= (position_S < end)[None]
        score_RS = jnp.where(seen_RS, scores.squash(product_RS), HIDDEN)
        new_top_R = jnp.maximum(top_R, jnp.max(score_RS, axis=1))
        shift_R = new_top_R * scores.base2
        weight_RS = scores.weight(score_RS, shift_R[:, None])
        decay_R = scores.weight(top_R, shift_R)
        total_R = decay_R * total_R + jnp.sum(weight_RS, axis=1)
        if value_scale_ref is not None:
            weight_RS *= value_scale_ref[slot_S][None]
        seen_RH = dot(weight_RS.astype(dtype), value_ref[slot_S].astype(dtype), (1, 0))
        return new_top_R, total_R, decay_R[:, None] * sum_RH + seen_RH

    state = (
        jnp.full((R,), FLOOR, jnp.float32),
        jnp.zeros((R,), jnp.float32),
        jnp.zeros(query_RH.shape, jnp.float32),
    )
    steps = lax.div(jnp.maximum(end - start, 0) + (S - 1), S)
    top_R, total_R, sum_RH = lax.fori_loop(0, steps, visit, state)
    store_rows(sum_ref, 0, count, sum_RH)
    store_rows(top_ref, 0, count, top_R * scores.base2)
    store_rows(total_ref, 0, count, total_R)


def _seen(position_R, segment_R, position_S, place_S, window, stored_position_ref, segment_ref):
    """Which rows see which positions; a ring's place must hold the position looked for there."""
    distance_RS = position_R[:, None] - position_S[None]
    seen_RS = (distance_RS >= 0) & (distance_RS < window)
    if stored_position_ref is not None:
        seen_RS &= (stored_position_ref[place_S] == position_S)[None]
    if segment_R is not None:
        seen_RS &= segment_R[:, None] == segment_ref[place_S][None]
    return seen_RS


def _share(bounds_ref, static):
    """First position of this program, and the one after the last: whole steps but for the end."""
    first, after = bounds_ref[0], bounds_ref[1]
    steps = lax.div(after - first + (static.tile.key - 1), static.tile.key)
    size = lax.div(steps + (static.shares - 1), static.shares) * static.tile.key
    start = first + pl.program_id(0) * size
    return start, jnp.minimum(start + size, after)


def _slots_of(position_S, pages_ref, static):
    """Slots of the pool in which positions of this program's row are stored; places in a page."""
    page_S = jnp.full_like(position_S, static.page)
    column_S = jnp.minimum(lax.div(position_S, page_S), pages_ref.shape[0] - 1)
    place_S = lax.rem(position_S, page_S)
    return pages_ref[column_S] * static.page + place_S, place_S


def _combine(sum_BKCRH, top_BKCR, total_BKCR, sinks_N):
    """Joins the shares of a row; 0 where none of them saw anything."""
    top_BKR = jnp.max(top_BKCR, axis=2)
    decay_BKCR = jnp.exp2(top_BKCR - top_BKR[:, :, None])
    total_BKR = jnp.sum(decay_BKCR * total_BKCR, axis=2)
    sum_BKRH = jnp.sum(decay_BKCR[..., None] * sum_BKCRH, axis=2)
    sink = None
    if sinks_N is not None:
        K, R = top_BKR.shape[1:]
        groups = sinks_N.astype(jnp.float32).reshape(K, -1) * LOG2_E
        sink = jnp.tile(groups, (1, R // groups.shape[1]))[None]
    return normalise(top_BKR, total_BKR, sum_BKRH, sink)[0]


def _check(query_BTNH, key, value, key_scales, value_scales, scale, logit_softcap) -> None:
    T, N, H = query_BTNH.shape[1:]
    common.check_rows("GPU decode", T, N // key.shape[2], MAX_ROWS)
    common.check_head_size("GPU decode", H, common.TRITON_HEAD_SIZES)
    common.check_cache("GPU decode", query_BTNH, (key, value), (key_scales, value_scales))
    common.check_scores("GPU decode", scale, logit_softcap)
