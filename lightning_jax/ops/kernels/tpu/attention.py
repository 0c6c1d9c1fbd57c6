"""Sliding-window attention for TPUs: the differentiable op over the Pallas kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from lightning_jax.ops.kernels.tpu import blocks as tpu_blocks
from lightning_jax.ops.kernels.tpu.backward import backward
from lightning_jax.ops.kernels.tpu.band import LANES, LOG2_E, Band, BlockSizes
from lightning_jax.ops.kernels.tpu.blocks import Blocks
from lightning_jax.ops.kernels.tpu.forward import forward

DTYPES = (jnp.bfloat16, jnp.float32)


def sliding_window_attention(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    *,
    window: int | None,
    query_segments_BT: jax.Array | None = None,
    key_segments_BT: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    scale: float,
    logit_softcap: float | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    blocks: Blocks | None = None,
) -> jax.Array:
    """Causal grouped-query attention over aligned rows: query t sees keys t-window+1 .. t.

    Differentiable (reverse mode only) in query, key, value and sinks; time grows with length x
    window. Keys and values are read once, only tiles inside the window are visited. Equal inputs
    give equal bits.

    Args:
        query_BTNH: queries, bfloat16 or float32; N is a multiple of K.
        key_BTKH: keys, of the same length and dtype as the queries.
        value_BTKH: values.
        window: visible keys per query, self included; None for all.
        query_segments_BT: int32, document of each query, [B, T] or [1, T]; 0 is padding, which
            sees nothing. None together with `key_segments_BT` means one document.
        key_segments_BT: document of each key; 0 is padding, which nobody sees.
        sinks_N: per head logit that joins the softmax denominator only.
        scale: factor of the scores, positive. The queries carry it, in their own dtype.
        logit_softcap: c in c x tanh(logit / c) (Gemma 2, arXiv:2408.00118), applied to the scaled
            scores, not to sinks; None for none.
        interpret: run as plain JAX on any device, for tests; or a simulation of a TPU's memories.
        blocks: block sizes; by device, head size and window from a table by default.

    Returns:
        out_BTNH in the dtype of the queries; exactly 0 where a query sees nothing, which then sends
        no gradient anywhere. Scores, softmax and sums are float32, products take their operands in
        the input dtype.

    Raises:
        ValueError: a dtype, scale, soft-cap or window that the kernels cannot honour; more keys in
            sight of a block of queries than fast memory can hold.
    """
    _check(query_BTNH, key_BTKH, value_BTKH, window, scale, logit_softcap)
    T, N, H = query_BTNH.shape[1:]
    K = key_BTKH.shape[2]
    head_size = LANES // 2 if H <= LANES // 2 else -(-H // LANES) * LANES
    blocks = blocks or tpu_blocks.blocks_for(
        tpu_blocks.device_kind(), head_size, N // K, T, window, query_BTNH.dtype.itemsize
    )
    length = -(-T // blocks.longest) * blocks.longest
    call = _Call(
        length=length,
        window=min(window or length, length),
        head_size=head_size,
        scale=float(scale),
        softcap=None if logit_softcap is None else float(logit_softcap),
        blocks=blocks,
        interpret=interpret,
    )
    segments = None
    if query_segments_BT is not None:
        shape = query_BTNH.shape[:2]
        segments = tuple(jnp.broadcast_to(x, shape) for x in (query_segments_BT, key_segments_BT))
    return _attention(call, query_BTNH, key_BTKH, value_BTKH, sinks_N, segments)


class _Call(NamedTuple):
    """Everything static about a call: sizes are padded ones."""

    length: int
    window: int
    head_size: int
    scale: float
    softcap: float | None
    blocks: Blocks
    interpret: bool | pltpu.InterpretParams

    def band(self, query_BTNH, key_BTKH, sinks_N, segments, blocks: BlockSizes) -> Band:
        """The geometry of one pass."""
        N, K = query_BTNH.shape[2], key_BTKH.shape[2]
        return Band(
            length=self.length,
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

    def pad(self, x_BTNH: jax.Array) -> jax.Array:
        """Pads time and head size with zeros; heads side by side: x_BTX."""
        B, T, N, H = x_BTNH.shape
        padding = (0, 0), (0, self.length - T), (0, 0), (0, self.head_size - H)
        return jnp.pad(x_BTNH, padding).reshape(B, self.length, N * self.head_size)

    def unpad(self, x_BTX: jax.Array, like_BTNH: jax.Array) -> jax.Array:
        """The inverse of `pad`."""
        B, T, N, H = like_BTNH.shape
        return x_BTX.reshape(B, self.length, N, self.head_size)[:, :T, :, :H]

    def pad_segments(self, segments):
        """Pads segments with padding."""
        if segments is None:
            return None
        return tuple(jnp.pad(x_BT, ((0, 0), (0, self.length - x_BT.shape[1]))) for x_BT in segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call, query_BTNH, key_BTKH, value_BTKH, sinks_N, segments):
    return _forward(call, query_BTNH, key_BTKH, value_BTKH, sinks_N, segments)[0]


def _forward(call, query_BTNH, key_BTKH, value_BTKH, sinks_N, segments):
    arrays = query_BTNH, key_BTKH, value_BTKH
    band = call.band(query_BTNH, key_BTKH, sinks_N, segments, call.blocks.forward)
    out_BTX, lse_BGST = forward(band, *map(call.pad, arrays), sinks_N, call.pad_segments(segments))
    out_BTNH = call.unpad(out_BTX, query_BTNH)
    B, T, N, _ = query_BTNH.shape
    lse_BNT = lse_BGST.reshape(B, N, call.length)[:, :, :T]
    return out_BTNH, (*arrays, sinks_N, segments, out_BTNH, lse_BNT)


def _backward(call, saved, dout_BTNH):
    query_BTNH, key_BTKH, value_BTKH, sinks_N, segments, out_BTNH, lse_BNT = saved
    arrays = query_BTNH, key_BTKH, value_BTKH
    band = call.band(query_BTNH, key_BTKH, sinks_N, segments, call.blocks.backward)
    B, T, N, _ = query_BTNH.shape
    padded_BNT = jnp.pad(lse_BNT, ((0, 0), (0, 0), (0, call.length - T)))
    lse_BGST = padded_BNT.reshape(B, band.heads_steps, band.heads_step, call.length)
    gradients = backward(
        band,
        *map(call.pad, (*arrays, out_BTNH, dout_BTNH)),
        lse_BGST,
        call.pad_segments(segments),
    )
    gradients = [call.unpad(x, like) for x, like in zip(gradients, arrays, strict=True)]
    dsinks_N = None
    if sinks_N is not None:
        share_BNT = jnp.exp2(sinks_N.astype(jnp.float32)[None, :, None] * LOG2_E - lse_BNT)
        delta_BNT = jnp.einsum(
            "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
        )
        dsinks_N = -jnp.sum(share_BNT * delta_BNT, (0, 2)).astype(sinks_N.dtype)
    return *gradients, dsinks_N, None


_attention.defvjp(_forward, _backward)


def _check(query_BTNH, key_BTKH, value_BTKH, window, scale, logit_softcap) -> None:
    dtype = query_BTNH.dtype
    if dtype not in DTYPES or not dtype == key_BTKH.dtype == value_BTKH.dtype:
        raise ValueError(
            f"pallas_tpu: dtypes {dtype}, {key_BTKH.dtype}, {value_BTKH.dtype}: must be bfloat16 or"
            " float32 for all three"
        )
    if query_BTNH.shape[1] != key_BTKH.shape[1]:
        raise ValueError(
            f"pallas_tpu: {query_BTNH.shape[1]} queries for {key_BTKH.shape[1]} keys: must be equal"
        )
    if window is not None and window < 1:
        raise ValueError(f"pallas_tpu: window={window}: must be at least 1 (self), or None for all")
    if not scale > 0:
        raise ValueError(f"pallas_tpu: scale={scale}: must be positive")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"pallas_tpu: logit_softcap={logit_softcap}: must be positive, or None")
