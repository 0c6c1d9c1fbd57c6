"""Backward kernels of sliding-window attention for GPUs, in Pallas Triton.

Probabilities are recomputed from the saved log-sum-exp (Dao et al., "FlashAttention",
arXiv:2205.14135, appendix B.4). Queries' gradients come from one kernel, which walks keys as the
forward pass does; keys' and values' gradients from another, which walks the queries of all heads of
a group. The scores are so computed twice, and in return every sum is taken in a fixed order by one
program: same inputs, same bits, without atomics or partial results in memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from lightning_jax.ops.kernels.common import dot, sink_gradient
from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks
from lightning_jax.ops.kernels.gpu.forward import (
    Problem,
    last_first,
    per_batch_row,
    query_walk,
    rows,
    span_at,
    store_rows,
    visible_pairs,
    walk,
)


def backward(problem: Problem, query, key, value, sinks_N, segments, out, lse_BNT, dout):
    """Returns the gradients of query, key, value (shaped like them) and sinks (or None)."""
    inputs = problem, query, key, value, segments
    # A product of tiles wants one dtype, whatever the output's was.
    dout = dout.astype(query.dtype)
    dquery, delta_BNT = query_gradient(*inputs, out, lse_BNT, dout)
    dkey, dvalue = key_gradients(*inputs, lse_BNT, delta_BNT, dout)
    return dquery, dkey, dvalue, sink_gradient(sinks_N, lse_BNT, delta_BNT)


def query_gradient(
    problem, query_BTNH, key_BSKH, value_BSKH, segments, out_BTNH, lse_BNT, dout_BTNH
):
    """Returns the gradient of the queries, and delta_BNT, the sum of dout x out over H."""
    B, T, N, _ = query_BTNH.shape
    tile = problem.tiles.dquery
    inputs, specs = query_walk(problem, tile, query_BTNH, key_BSKH, value_BSKH, segments)
    statistic = pl.BlockSpec((None, None, T), lambda n, i, b: (b, n, 0))
    return pl.pallas_call(
        functools.partial(_dquery_kernel, problem=problem),
        grid=(N, pl.cdiv(T, tile.query), B),
        in_specs=[*specs, specs[0], statistic, specs[0]],
        out_specs=[specs[0], statistic],
        out_shape=[
            jax.ShapeDtypeStruct(query_BTNH.shape, query_BTNH.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=problem.scores.interpret,
        name="sliding_window_attention_dquery",
    )(*inputs, out_BTNH, lse_BNT, dout_BTNH)


def _dquery_kernel(
    query_ref,
    key_ref,
    value_ref,
    query_segments_ref,
    key_segments_ref,
    span_ref,
    out_ref,
    lse_ref,
    dout_ref,
    dquery_ref,
    delta_ref,
    *,
    problem: Problem,
):
    tile, band, scores = problem.tiles.dquery, problem.band, problem.scores
    P, S, T = tile.query, tile.key, band.queries
    block = last_first(T, P)
    here = block * P
    query_PH, dout_PH = rows(query_ref, here, P, T), rows(dout_ref, here, P, T)
    out_PH = rows(out_ref, here, P, T)
    delta_P = jnp.sum(dout_PH.astype(jnp.float32) * out_PH.astype(jnp.float32), axis=1)
    store_rows(delta_ref, here, T, delta_P)
    lse_P1, delta_P1 = rows(lse_ref, here, P, T)[:, None], delta_P[:, None]
    segments = query_segments_ref, key_segments_ref

    def visit(edge):
        length = band.keys if edge else None

        def body(index, dquery_PH):
            start = index * S
            key_SH = rows(key_ref, start, S, length)
            score_PS = scores.squash(dot(query_PH, key_SH, (1, 1)))
            weight_PS = scores.weight(score_PS, lse_P1)
            if edge:
                seen_PS = visible_pairs((here, P), (start, S), band, *segments, 0)
                weight_PS = jnp.where(seen_PS, weight_PS, 0.0)
            dweight_PS = dot(dout_PH, rows(value_ref, start, S, length), (1, 1))
            dscore_PS = scores.slope(score_PS, weight_PS * (dweight_PS - delta_P1))
            return dquery_PH + dot(dscore_PS.astype(key_SH.dtype), key_SH, (1, 0))

        return body

    span = span_at(span_ref, gpu_blocks.key_span, block, tile, problem)
    dquery_PH = walk(span, visit, jnp.zeros(query_PH.shape, jnp.float32))
    store_rows(dquery_ref, here, T, dquery_PH * scores.scale)


def key_gradients(
    problem, query_BTNH, key_BSKH, value_BSKH, segments, lse_BNT, delta_BNT, dout_BTNH
):
    """Returns the gradients of keys and values."""
    (B, T, N, H), (S, K) = query_BTNH.shape, key_BSKH.shape[1:3]
    tile = problem.tiles.dkey
    query_segments_BT, key_segments_BS, spans_BJ4 = None, None, None
    if segments is not None:
        query_segments_BT, key_segments_BS = segments
        sides, sizes = (key_segments_BS, query_segments_BT), (tile.key, tile.query)
        spans_BJ4 = gpu_blocks.packed_spans(
            gpu_blocks.query_span, *sides, sizes, tile, problem.band
        )
    group = pl.BlockSpec((None, T, N // K, H), lambda k, j, b: (b, 0, k, 0))
    single = pl.BlockSpec((None, S, None, H), lambda k, j, b: (b, 0, k, 0))
    statistic = pl.BlockSpec((None, N // K, T), lambda k, j, b: (b, k, 0))
    packed = query_segments_BT, key_segments_BS, spans_BJ4
    return pl.pallas_call(
        functools.partial(_dkey_kernel, problem=problem),
        grid=(K, pl.cdiv(S, tile.key), B),
        in_specs=[group, single, single, *map(per_batch_row, packed), statistic, statistic, group],
        out_specs=[single, single],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key_BSKH, value_BSKH)],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=problem.scores.interpret,
        name="sliding_window_attention_dkey",
    )(query_BTNH, key_BSKH, value_BSKH, *packed, lse_BNT, delta_BNT, dout_BTNH)


def _dkey_kernel(
    query_ref,
    key_ref,
    value_ref,
    query_segments_ref,
    key_segments_ref,
    span_ref,
    lse_ref,
    delta_ref,
    dout_ref,
    dkey_ref,
    dvalue_ref,
    *,
    problem: Problem,
):
    tile, band, scores = problem.tiles.dkey, problem.band, problem.scores
    P, S = tile.query, tile.key
    here = pl.program_id(1) * S
    key_SH, value_SH = (rows(ref, here, S, band.keys) for ref in (key_ref, value_ref))
    segments = query_segments_ref, key_segments_ref

    def visit(head, edge):
        length = band.queries if edge else None

        def body(index, state):
            dkey_SH, dvalue_SH = state
            start = index * P
            query_PH = rows(query_ref, start, P, length, head)
            dout_PH = rows(dout_ref, start, P, length, head)
            lse_1P = rows(lse_ref, start, P, length, head)[None]
            delta_1P = rows(delta_ref, start, P, length, head)[None]
            score_SP = scores.squash(dot(key_SH, query_PH, (1, 1)))
            weight_SP = scores.weight(score_SP, lse_1P)
            if edge:
                seen_SP = visible_pairs((start, P), (here, S), band, *segments, 1)
                weight_SP = jnp.where(seen_SP, weight_SP, 0.0)
            dvalue_SH += dot(weight_SP.astype(dout_PH.dtype), dout_PH, (1, 0))
            dweight_SP = dot(value_SH, dout_PH, (1, 1))
            dscore_SP = scores.slope(score_SP, weight_SP * (dweight_SP - delta_1P))
            return dkey_SH + dot(dscore_SP.astype(query_PH.dtype), query_PH, (1, 0)), dvalue_SH

        return body

    span = span_at(span_ref, gpu_blocks.query_span, pl.program_id(1), tile, problem)
    zeros = jnp.zeros(key_SH.shape, jnp.float32)
    dkey_SH, dvalue_SH = lax.fori_loop(
        0,
        query_ref.shape[1],
        lambda head, state: walk(span, functools.partial(visit, head), state),
        (zeros, zeros),
    )
    store_rows(dkey_ref, here, band.keys, dkey_SH * scores.scale)
    store_rows(dvalue_ref, here, band.keys, dvalue_SH)
