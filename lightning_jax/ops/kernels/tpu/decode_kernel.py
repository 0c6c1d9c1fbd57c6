"""The kernel of `tpu.decode`: walks the pages of each row of the batch.

Letters as there: R rows, C columns of a page, J pages of a row of the batch; X what is known of a
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lightning_jax.ops.kernels.common import FLOOR, HIDDEN, LOG2_E, dot

# Fast memory of a grid step: two pages in flight, the scores of one, and what is small.
VMEM_BYTES = 48 * 2**20


class Static(NamedTuple):
    """What the kernel is specialised to.

    Attributes:
      window: visible keys per query, self included.
      factor: of the products; the result is a logit in base 2, or the argument of the soft-cap.
      softcap: of the logits, or None.
      page: tokens per page.
      stored: whether slots come with positions, as those of rings do.
      segments: whether they come with segments too.
      quantized: whether keys and values are int8 with scales.
    """

    window: int
    factor: float
    softcap: float | None
    page: int
    stored: bool
    segments: bool
    quantized: bool


class _Refs(NamedTuple):
    """What a grid step reads and writes; None for what the call has not."""

    first: Any
    count: Any
    pages: Any
    query: Any
    rows: Any
    sinks: Any
    columns: Any
    pool: tuple[Any, ...]
    out: Any
    buffers: tuple[Any, ...]
    arrived: Any


def walk_pages(
    static: Static,
    walk: tuple[jax.Array, jax.Array],
    pages_BJ: jax.Array,
    rows_BRH: jax.Array,
    rows_BRX: jax.Array,
    sinks_R1: jax.Array,
    columns_2C: jax.Array,
    matrices: Sequence[jax.Array],
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """Returns out_BRH, each row's softmax over the columns of the pages that it walks.

    Args:
      static: what the kernel is specialised to.
      walk: int32 first_B and count_B, of pages that a row of the batch walks, around its J.
      pages_BJ: int32, where in the pools the row's pages are.
      rows_BRH: queries; R is a multiple of 16.
      rows_BRX: int32 key/value head and position of each row, and its segment.
      sinks_R1: float32 logits in base 2 that join the denominators.
      columns_2C: int32 key/value head of each column, and its token within the page.
      matrices: [pages, C, H] keys and values, then [pages, 1, C] their scales, positions and
        segments. Where positions are stored, only keys and values are looked up in `pages_BJ`, as
        they may lie among other layers'; of the rest, page j of row b is the one at b x J + j.
      interpret: run as plain JAX on any device, or simulate a TPU's memories.
    """
    B, R, H = rows_BRH.shape
    each = pl.BlockSpec((1, R, H), lambda b, *_: (b, 0, 0))
    buffers = [pltpu.VMEM((2, *x.shape[1:]), x.dtype) for x in matrices]

    def kernel(first, count, pages, query, rows, sinks, columns, *rest):
        n = len(matrices)
        pool, out, buffers, arrived = rest[:n], rest[n], rest[n + 1 : -1], rest[-1]
        _kernel(
            static,
            _Refs(first, count, pages, query, rows, sinks, columns, pool, out, buffers, arrived),
        )

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B,),
            in_specs=[
                each,
                pl.BlockSpec((1, R, rows_BRX.shape[2]), lambda b, *_: (b, 0, 0)),
                pl.BlockSpec(sinks_R1.shape, lambda b, *_: (0, 0)),
                pl.BlockSpec(columns_2C.shape, lambda b, *_: (0, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(matrices),
            ],
            out_specs=each,
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2, len(matrices)))],
        ),
        out_shape=jax.ShapeDtypeStruct(rows_BRH.shape, rows_BRH.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="cache_decode",
    )(
        *(x.astype(jnp.int32) for x in walk),
        pages_BJ,
        rows_BRH,
        rows_BRX,
        sinks_R1,
        columns_2C,
        *matrices,
    )


def _kernel(static: Static, refs: _Refs) -> None:
    row = pl.program_id(0)
    first, count, wrap = refs.first[row], refs.count[row], refs.pages.shape[1]

    def place(turn):
        """Which page of the row the turn takes: a ring may come around."""
        at = first + turn
        return jnp.where(at >= wrap, at - wrap, at)

    def copies(turn):
        slot = lax.bitwise_and(turn, 1)
        page = refs.pages[row, place(turn)]
        rest = row * wrap + place(turn) if static.stored else page
        pages = [page, page] + [rest] * (len(refs.pool) - 2)
        return [
            pltpu.make_async_copy(source.at[page], target.at[slot], refs.arrived.at[slot, index])
            for index, (page, source, target) in enumerate(
                zip(pages, refs.pool, refs.buffers, strict=True)
            )
        ]

    def start(turn):
        @pl.when(turn < count)
        def _():
            for copy in copies(turn):
                copy.start()

    query_RH = (refs.query[0].astype(jnp.float32) * static.factor).astype(refs.query.dtype)
    start(jnp.int32(0))

    def visit(turn, state):
        start(turn + 1)
        for copy in copies(turn):
            copy.wait()
        page = [buffer[lax.bitwise_and(turn, 1)] for buffer in refs.buffers]
        return _update(static, refs, query_RH, page, place(turn) * static.page, state)

    R, H = query_RH.shape
    state = jnp.full((R, 1), FLOOR), jnp.zeros((R, 1)), jnp.zeros((R, H))
    top_R1, total_R1, sum_RH = lax.fori_loop(0, count, visit, state)
    new_top_R1 = jnp.maximum(top_R1, refs.sinks[...])
    decay_R1 = jnp.exp2(top_R1 - new_top_R1)
    total_R1 = decay_R1 * total_R1 + jnp.exp2(refs.sinks[...] - new_top_R1)
    total_R1 = jnp.where(total_R1 > 0, total_R1, 1.0)
    refs.out[0] = (sum_RH * (decay_R1 / total_R1)).astype(refs.out.dtype)


def _update(static, refs, query_RH, page, position, state):
    """Adds a page, whose first token has `position` unless stored, to a running softmax."""
    top_R1, total_R1, sum_RH = state
    key_CH, value_CH, *rest = page
    if static.quantized:
        key_CH, value_CH = (x.astype(query_RH.dtype) for x in (key_CH, value_CH))
        key_scale_1C, value_scale_1C, *rest = rest
    scores_RC = dot(query_RH, key_CH, (1, 1))
    if static.quantized:
        scores_RC *= key_scale_1C
    if static.softcap is not None:
        scores_RC = static.softcap * LOG2_E * jnp.tanh(scores_RC)
    key_1C = rest[0] if static.stored else position + refs.columns[1:2]
    distance_RC = refs.rows[0, :, 1:2] - key_1C
    visible_RC = refs.rows[0, :, 0:1] == refs.columns[0:1]
    visible_RC &= (distance_RC >= 0) & (distance_RC < static.window)
    if static.segments:
        visible_RC &= (refs.rows[0, :, 2:3] == rest[1]) & (rest[1] != 0)
    scores_RC = jnp.where(visible_RC, scores_RC, HIDDEN)
    new_top_R1 = jnp.maximum(top_R1, jnp.max(scores_RC, axis=1, keepdims=True))
    weights_RC = jnp.exp2(scores_RC - new_top_R1)
    decay_R1 = jnp.exp2(top_R1 - new_top_R1)
    total_R1 = decay_R1 * total_R1 + jnp.sum(weights_RC, axis=1, keepdims=True)
    if static.quantized:
        weights_RC *= value_scale_1C
    seen_RH = dot(weights_RC.astype(value_CH.dtype), value_CH, (1, 0))
    return new_top_R1, total_R1, decay_R1 * sum_RH + seen_RH
