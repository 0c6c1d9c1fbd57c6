"""Sliding-window attention for TPUs: the differentiable op over the Pallas kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from lightning_jax.ops.kernels import common
from lightning_jax.ops.kernels.tpu import blocks as tpu_blocks
from lightning_jax.ops.kernels.tpu.backward import backward
from lightning_jax.ops.kernels.tpu.band import LANES, Band, BlockSizes
from lightning_jax.ops.kernels.tpu.blocks import Blocks
from lightning_jax.ops.kernels.tpu.forward import forward

DTYPES = (jnp.bfloat16, jnp.float32)


def sliding_window_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    window: int | None,
    query_segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    scale: float,
    logit_softcap: float | None = None,
    query_offset: int = 0,
    interpret: bool | pltpu.InterpretParams = False,
    blocks: Blocks | None = None,
) -> jax.Array:
    """Causal grouped-query attention: query t, which is key s = t + offset, sees s-window+1 .. s.

    Differentiable (reverse mode only) in query, key, value and sinks; time grows with queries x
    window. Keys and values that are seen are read once, only tiles inside the window are visited.
    Keys that no query sees get gradients of exactly 0. Equal inputs give equal bits.

    Args:
        query_BTNH: queries, bfloat16 or float32; N is a multiple of K.
        key_BSKH: keys in the queries' dtype, S = T + `query_offset`.
        value_BSKH: values.
        window: visible keys per query, self included; None for all.
        query_segments_BT: int32, document of each query, [B, T] or [1, T]; 0 is padding, which
            sees nothing. None together with `key_segments_BS` means one document.
        key_segments_BS: document of each key, [B, S] or [1, S]; 0 is padding, which nobody sees.
        sinks_N: per head logit that joins the softmax denominator only.
        scale: factor of the scores, positive. The queries carry it, in their own dtype.
        logit_softcap: c in c x tanh(logit / c) (Gemma 2, arXiv:2408.00118), applied to the scaled
            scores, not to sinks; None: no soft-cap.
        query_offset: keys before the first query.
        interpret: run as plain JAX on any device, for tests; or a simulation of a TPU's memories.
        blocks: block sizes; by device, head size and window from a table by default.

    Returns:
        out_BTNH in the dtype of the queries; exactly 0 where a query sees nothing, which then sends
        no gradient anywhere. Scores, softmax and sums are float32, products take their operands in
        the input dtype.

    Raises:
        ValueError: a dtype, scale, soft-cap, window or offset that the kernels cannot honour;
            another number of keys than T + offset; more keys in sight of a block of queries than
            fast memory can hold.
    """
    (T, N, H), (S, K) = query_BTNH.shape[1:], key_BSKH.shape[1:3]
    common.check_dtypes("pallas_tpu", (query_BTNH, key_BSKH, value_BSKH), DTYPES)
    common.check_band("pallas_tpu", T, S, window, query_offset)
    common.check_scores("pallas_tpu", scale, logit_softcap)
    head_size = LANES // 2 if H <= LANES // 2 else -(-H // LANES) * LANES
    blocks = blocks or tpu_blocks.blocks_for(
        tpu_blocks.device_kind(),
        head_size,
        N // K,
        T,
        window,
        query_BTNH.dtype.itemsize,
        query_offset,
    )
    place = _place(T, query_offset, window, blocks.longest)
    call = _Call(
        place=place,
        window=min(window or place.length, place.length),
        head_size=head_size,
        scale=float(scale),
        softcap=None if logit_softcap is None else float(logit_softcap),
        blocks=blocks,
        interpret=interpret,
    )
    segments = None
    if query_segments_BT is not None and key_segments_BS is not None:
        segments = tuple(
            jnp.broadcast_to(x, (query_BTNH.shape[0], x.shape[1]))
            for x in (query_segments_BT, key_segments_BS)
        )
    return _attention(call, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments)


class _Place(NamedTuple):
    """Where queries and keys lie in a padded row, which starts with whole blocks of keys alone.

    Attributes:
        length: keys of the padded row.
        offset: those before the first query of the padded row.
        queries: positions added in front of the queries and behind them.
        keys: the same for keys; a negative number of them is left out.
    """

    length: int
    offset: int
    queries: tuple[int, int]
    keys: tuple[int, int]


def _place(queries: int, offset: int, window: int | None, block: int) -> _Place:
    if window is not None and window - 1 <= offset:
        # What lies before all windows is seen by nobody: keys are left out or added there.
        first_query, before = 0, -(-(window - 1) // block) * block
        first_key = before - offset
    else:
        first_query, first_key = offset % block, 0
        before = offset - first_query
    behind = -(first_query + queries) % block
    length = before + first_query + queries + behind
    return _Place(length, before, (first_query, behind), (first_key, behind))


class _Call(NamedTuple):
    """Everything static about a call: sizes are padded ones."""

    place: _Place
    window: int
    head_size: int
    scale: float
    softcap: float | None
    blocks: Blocks
    interpret: bool | pltpu.InterpretParams

    def band(self, query_BTNH, key_BSKH, sinks_N, segments, blocks: BlockSizes) -> Band:
        """The geometry of one pass."""
        N, K = query_BTNH.shape[2], key_BSKH.shape[2]
        return Band(
            length=self.place.length,
            offset=self.place.offset,
            window=self.window,
            kv_heads=K,
            group=N // K,
            head_size=self.head_size,
            scale=self.scale,
            softcap=self.softcap,
            segments=segments is not None,
            sinks=sinks_N is not None,
            blocks=blocks,
            fast_memory=tpu_blocks.fast_memory(tpu_blocks.device_kind()),
            interpret=self.interpret,
        )

    def pad(self, x_BTNH: jax.Array, ends: tuple[int, int]) -> jax.Array:
        """Pads time and head size with zeros; heads side by side: x_BTX."""
        B, _, N, H = x_BTNH.shape
        x_BTNH = _extended(_extended(x_BTNH, 1, *ends), 3, 0, self.head_size - H)
        return x_BTNH.reshape(B, -1, N * self.head_size)

    def unpad(self, x_BTX: jax.Array, like_BTNH: jax.Array, ends: tuple[int, int]) -> jax.Array:
        """The inverse of `pad`; 0 where positions were left out."""
        B, _, N, H = like_BTNH.shape
        x_BTNH = x_BTX.reshape(B, -1, N, self.head_size)[..., :H]
        return _extended(x_BTNH, 1, *(-end for end in ends))

    def pad_segments(self, segments):
        """Pads segments with padding."""
        if segments is None:
            return None
        ends = self.place.queries, self.place.keys
        return tuple(_extended(x, 1, *more) for x, more in zip(segments, ends, strict=True))


def _extended(x: jax.Array, axis: int, front: int, behind: int) -> jax.Array:
    """Adds zeros at both ends of an axis; leaves positions out where a number is negative."""
    ends = [(0, 0, 0)] * x.ndim
    ends[axis] = front, behind, 0
    return lax.pad(x, jnp.zeros((), x.dtype), ends)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments):
    return _forward(call, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments)[0]


def _forward(call, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments):
    band = call.band(query_BTNH, key_BSKH, sinks_N, segments, call.blocks.forward)
    queries, keys = call.place.queries, call.place.keys
    out_BTX, lse_BGST = forward(
        band,
        call.pad(query_BTNH, queries),
        call.pad(key_BSKH, keys),
        call.pad(value_BSKH, keys),
        sinks_N,
        call.pad_segments(segments),
    )
    out_BTNH = call.unpad(out_BTX, query_BTNH, queries)
    B, T, N, _ = query_BTNH.shape
    lse_BNT = lse_BGST.reshape(B, N, -1)[:, :, queries[0] : queries[0] + T]
    return out_BTNH, (query_BTNH, key_BSKH, value_BSKH, sinks_N, segments, out_BTNH, lse_BNT)


def _backward(call, saved, dout_BTNH):
    query_BTNH, key_BSKH, value_BSKH, sinks_N, segments, out_BTNH, lse_BNT = saved
    band = call.band(query_BTNH, key_BSKH, sinks_N, segments, call.blocks.backward)
    queries, keys = call.place.queries, call.place.keys
    padded_BNT = _extended(lse_BNT, 2, *queries)
    dquery_BTX, dkey_BSX, dvalue_BSX = backward(
        band,
        call.pad(query_BTNH, queries),
        call.pad(key_BSKH, keys),
        call.pad(value_BSKH, keys),
        call.pad(out_BTNH, queries),
        call.pad(dout_BTNH, queries),
        padded_BNT.reshape(len(lse_BNT), band.heads_steps, band.heads_step, -1),
        call.pad_segments(segments),
    )
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT",
        out_BTNH,
        dout_BTNH,
        precision=common.precision(out_BTNH.dtype),
        preferred_element_type=jnp.float32,
    )
    return (
        call.unpad(dquery_BTX, query_BTNH, queries),
        call.unpad(dkey_BSX, key_BSKH, keys),
        call.unpad(dvalue_BSX, value_BSKH, keys),
        common.sink_gradient(sinks_N, lse_BNT, delta_BNT),
        None,
    )


_attention.defvjp(_forward, _backward)
