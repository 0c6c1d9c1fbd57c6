"""Forward kernel of sliding-window attention for GPUs, in Pallas Triton.

One program computes one block of queries of one head. It walks the key blocks that its window and
its documents reach, with a running softmax in base 2 (Milakov & Gimelshein, arXiv:1805.02867; Dao,
"FlashAttention-2", arXiv:2307.08691, section 3.1): masked blocks at the far edge of the window,
unmasked ones inside, masked ones at the diagonal.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from lightning_jax.ops.kernels.common import FLOOR, HIDDEN, LOG2_E, dot
from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks
from lightning_jax.ops.kernels.gpu.blocks import Band, Span, Tile, Tiles

# Stands for the segment of a padding key: no query is in it.
_NO_SEGMENT = np.iinfo(np.int32).min


class Scores(NamedTuple):
    """From products of queries and keys to softmax weights, and back for gradients.

    Attributes:
        scale: factor of the products, positive.
        cap: soft-cap of the logits, or None.
        interpret: run as plain JAX instead of compiling for a GPU.
    """

    scale: float
    cap: float | None
    interpret: bool

    @property
    def base2(self) -> float:
        """Factor from squashed scores to logits in base 2."""
        return LOG2_E * (self.scale if self.cap is None else self.cap)

    def squash(self, product):
        """Scores up to the factor `base2`: the product itself, or tanh(scale x product / cap)."""
        if self.cap is None:
            return product
        if self.interpret:
            return jnp.tanh(product * (self.scale / self.cap))
        # tanh x = 1 - 2 / (1 + exp 2x), exact to 1e-7; the compiler's tanh branches per element.
        factor = _literal(2.0 * LOG2_E * self.scale / self.cap)
        return _inline(
            f"mul.rn.f32 y, $1, {factor}; ex2.approx.ftz.f32 y, y;"
            f" add.rn.f32 y, y, {_literal(1)}; rcp.approx.ftz.f32 y, y;"
            f" fma.rn.f32 $0, y, {_literal(-2)}, {_literal(1)};",
            product,
        )

    def slope(self, score, dlogit):
        """Gradient of the product, up to the factor `scale`, from that of the logit."""
        return dlogit if self.cap is None else dlogit * (1.0 - score * score)

    def weight(self, score, shift):
        """2 ** (base2 x score - shift), where results below 2**-126 are 0.

        On a GPU these are two instructions; written in JAX they are six, because the compiler fuses
        no product with a sum and rescales the exponential to keep denormal results.
        """
        if self.interpret:
            return jnp.exp2(score * self.base2 - shift)
        return _inline(
            f"fma.rn.f32 y, $1, {_literal(self.base2)}, $2; ex2.approx.ftz.f32 $0, y;",
            score,
            jnp.broadcast_to(-shift, score.shape),
        )


def _inline(instructions: str, *arrays):
    """Elementwise PTX on float32 arrays $1, $2 ... of one shape; y is a register of its own."""
    [result] = plt.elementwise_inline_asm(
        f"{{ .reg .f32 y; {instructions} }}",
        args=arrays,
        constraints=",".join(["=f"] + ["f"] * len(arrays)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)],
    )
    return result


def _literal(value: float) -> str:
    """A float32 number as PTX writes it."""
    return "0f" + struct.pack(">f", value).hex()


class Problem(NamedTuple):
    """Everything static: the kernels are specialised to it.

    Attributes:
        band: numbers of queries and keys of a row, and which pairs are visible.
        scores: scale, soft-cap, and whether to interpret.
        tiles: tiles of the kernels.
    """

    band: Band
    scores: Scores
    tiles: Tiles


def rows(ref, start, size, length=None, head=None):
    """Loads `size` rows of a [time, ...] array from `start`; those from `length` on are 0.

    Without `length` the caller knows that all are inside. `head` picks one of [time, head, H] or,
    for an array without H, of [head, time].
    """
    part = pl.ds(start, size)
    if head is None:
        view = ref.at[part]
    else:
        view = ref.at[part, head] if len(ref.shape) == 3 else ref.at[head, part]
    if length is None:
        return plt.load(view)
    inside = start + jnp.arange(size) < length
    return plt.load(view, mask=lax.broadcast_in_dim(inside, view.shape, (0,)), other=0)


def store_rows(ref, start, length, tile_PX):
    """Stores the rows of a tile from `start` that lie before `length`, in the dtype of `ref`."""
    inside = start + jnp.arange(tile_PX.shape[0]) < length
    plt.store(
        ref.at[pl.ds(start, tile_PX.shape[0])],
        tile_PX.astype(ref.dtype),
        mask=lax.broadcast_in_dim(inside, tile_PX.shape, (0,)),
    )


def visible_pairs(queries, keys, band: Band, query_segments_ref, key_segments_ref, axis):
    """Mask of the pairs of a block: queries vary along `axis`, keys along the other.

    `queries` and `keys` are (first position, count). Without segments a row is one document.
    """

    def along(vector, axis):
        return vector[:, None] if axis == 0 else vector[None]

    distance = along(band.offset + queries[0] + jnp.arange(queries[1]), axis)
    distance -= along(keys[0] + jnp.arange(keys[1]), 1 - axis)
    # One comparison for both edges: as unsigned numbers, negative distances are huge.
    seen = distance.astype(jnp.uint32) < np.uint32(band.window)
    if query_segments_ref is not None:
        key_segments = rows(key_segments_ref, keys[0], keys[1], band.keys)
        key_segments = jnp.where(key_segments == 0, _NO_SEGMENT, key_segments)
        query_segments = rows(query_segments_ref, queries[0], queries[1], band.queries)
        seen &= along(query_segments, axis) == along(key_segments, 1 - axis)
    return seen


def walk(span: Span, visit, state):
    """Folds `visit(edge)` over the blocks of a span; only those at its edges have `edge` True."""
    state = lax.fori_loop(span.begin, span.full_begin, visit(True), state)
    state = lax.fori_loop(span.full_begin, span.full_end, visit(False), state)
    return lax.fori_loop(span.full_end, span.end, visit(True), state)


def last_first(queries, size):
    """This program's block of queries: the last ones, which see most, are computed first."""
    return pl.cdiv(queries, size) - 1 - pl.program_id(1)


def span_at(span_ref, span_of, block, tile: Tile, problem: Problem) -> Span:
    """Reads a block's span from the table of packed rows, or computes it."""
    if span_ref is None:
        return span_of(block, tile, problem.band)
    return Span(*(span_ref[block, edge] for edge in range(4)))


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    query_segments_ref,
    key_segments_ref,
    span_ref,
    sinks_ref,
    out_ref,
    lse_ref,
    *,
    problem: Problem,
):
    tile, band, scores = problem.tiles.forward, problem.band, problem.scores
    P, S = tile.query, tile.key
    block = last_first(band.queries, P)
    here = block * P
    query_PH = rows(query_ref, here, P, band.queries)
    segments = query_segments_ref, key_segments_ref

    def visit(edge):
        length = band.keys if edge else None

        def body(index, state):
            top_P, total_P, sum_PH = state
            start = index * S
            score_PS = scores.squash(dot(query_PH, rows(key_ref, start, S, length), (1, 1)))
            if edge:
                seen_PS = visible_pairs((here, P), (start, S), band, *segments, 0)
                score_PS = jnp.where(seen_PS, score_PS, HIDDEN)
            new_top_P = jnp.maximum(top_P, jnp.max(score_PS, axis=1))
            shift_P = new_top_P * scores.base2
            weight_PS = scores.weight(score_PS, shift_P[:, None])
            decay_P = scores.weight(top_P, shift_P)
            value_SH = rows(value_ref, start, S, length)
            seen_PH = dot(weight_PS.astype(value_SH.dtype), value_SH, (1, 0))
            return (
                new_top_P,
                decay_P * total_P + jnp.sum(weight_PS, axis=1),
                decay_P[:, None] * sum_PH + seen_PH,
            )

        return body

    state = (
        jnp.full((P,), FLOOR, jnp.float32),
        jnp.zeros((P,), jnp.float32),
        jnp.zeros(query_PH.shape, jnp.float32),
    )
    span = span_at(span_ref, gpu_blocks.key_span, block, tile, problem)
    top_P, total_P, sum_PH = walk(span, visit, state)
    sink = None if sinks_ref is None else sinks_ref[0] * LOG2_E
    out_PH, lse_P = normalise(top_P * scores.base2, total_P, sum_PH, sink)
    store_rows(out_ref, here, band.queries, out_PH)
    store_rows(lse_ref, here, band.queries, lse_P)


def normalise(top_P, total_P, sum_PH, sink):
    """Ends the running softmax in base 2; output and log-sum-exp are 0 where nothing was seen."""
    if sink is not None:
        new_top_P = jnp.maximum(top_P, sink)
        decay_P = jnp.exp2(top_P - new_top_P)
        sum_PH = decay_P[..., None] * sum_PH
        total_P = decay_P * total_P + jnp.exp2(sink - new_top_P)
        top_P = new_top_P
    seen_P = total_P > 0
    total_P = jnp.where(seen_P, total_P, 1.0)
    lse_P = jnp.where(seen_P, top_P + LOG2_E * jnp.log(total_P), 0.0)
    return sum_PH * (1.0 / total_P)[..., None], lse_P


def forward(problem: Problem, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments):
    """Returns (out_BTNH, lse_BNT); `lse_BNT` is the log-sum-exp of the logits in base 2."""
    B, T, N, H = query_BTNH.shape
    tile = problem.tiles.forward
    inputs, in_specs = query_walk(problem, tile, query_BTNH, key_BSKH, value_BSKH, segments)
    if sinks_N is not None:
        sinks_N = sinks_N.astype(jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, problem=problem),
        grid=(N, pl.cdiv(T, tile.query), B),
        in_specs=[*in_specs, None if sinks_N is None else pl.BlockSpec((1,), lambda n, i, b: (n,))],
        out_specs=[in_specs[0], pl.BlockSpec((None, None, T), lambda n, i, b: (b, n, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, N, H), query_BTNH.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=problem.scores.interpret,
        name="sliding_window_attention_forward",
    )(*inputs, sinks_N)


def query_walk(problem: Problem, tile: Tile, query_BTNH, key_BSKH, value_BSKH, segments):
    """Operands and their specs for a grid (query head, query block, batch row) that walks keys.

    Head varies fastest, so the heads of a group run side by side and find their keys in the cache.
    """
    (T, N, H), (S, K) = query_BTNH.shape[1:], key_BSKH.shape[1:3]
    query_segments_BT, key_segments_BS, spans_BI4 = None, None, None
    if segments is not None:
        query_segments_BT, key_segments_BS = segments
        sizes = tile.query, tile.key
        spans_BI4 = gpu_blocks.packed_spans(
            gpu_blocks.key_span, query_segments_BT, key_segments_BS, sizes, tile, problem.band
        )
    key_spec = pl.BlockSpec((None, S, None, H), lambda n, i, b: (b, 0, lax.div(n, N // K), 0))
    operands = [query_BTNH, key_BSKH, value_BSKH, query_segments_BT, key_segments_BS, spans_BI4]
    specs = [
        pl.BlockSpec((None, T, None, H), lambda n, i, b: (b, 0, n, 0)),
        key_spec,
        key_spec,
        *map(per_batch_row, operands[3:]),
    ]
    return operands, specs


def per_batch_row(array_BX):
    """Spec of an array with B rows or one for all, by the grid's last axis; None for no array."""
    if array_BX is None:
        return None
    block, trailing = (None, *array_BX.shape[1:]), (0,) * (array_BX.ndim - 1)
    shared = array_BX.shape[0] == 1
    return pl.BlockSpec(block, lambda x, i, b: (0 if shared else b, *trailing))
