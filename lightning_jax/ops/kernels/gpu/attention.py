"""Sliding-window attention for GPUs: the differentiable op over the Pallas Triton kernels.

Triton runs on everything from Ampere on. JAX 0.11 calls its Triton back end deprecated in favour of
Mosaic GPU, which compiles for Hopper and Blackwell alone; the kernels compile with 0.10 and 0.11.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks
from lightning_jax.ops.kernels.gpu.backward import backward
from lightning_jax.ops.kernels.gpu.blocks import Tiles
from lightning_jax.ops.kernels.gpu.forward import Problem, Scores, forward

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


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
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Causal grouped-query attention over aligned rows: query t sees keys t-window+1 .. t.

    For NVIDIA GPUs from Ampere on. Differentiable (reverse mode only) in query, key, value and
    sinks; time and memory grow with length x window. Only blocks inside the window, and of
    documents that meet, are visited. Equal inputs give equal bits.

    Args:
        query_BTNH: queries; N is a multiple of K; H is a power of two from 16 to 256.
        key_BTKH: keys, of the same length as the queries.
        value_BTKH: values.
        window: visible keys per query, self included; None for all.
        query_segments_BT: int32, document of each query, [B, T] or [1, T]; 0 is padding, which
            sees nothing. None together with `key_segments_BT` means one document.
        key_segments_BT: document of each key; 0 is padding, which nobody sees.
        sinks_N: per head logit that joins the softmax denominator only.
        scale: factor of the scores, positive.
        logit_softcap: c in c x tanh(logit / c) (Gemma 2, arXiv:2408.00118), applied to the scaled
            scores, not to sinks; None for none.
        interpret: run as plain JAX on any device, for tests.
        tiles: block sizes; by device, head size and window from a table by default.

    Returns:
        out_BTNH in the dtype of the queries; exactly 0 where a query sees nothing, which then sends
        no gradient anywhere. Scores, softmax and sums are float32, products take their operands in
        the input dtype (float32 ones are not rounded to TF32).

    Raises:
        ValueError: a head size, dtype, scale, soft-cap or window that the kernels cannot honour.
    """
    _check(query_BTNH, key_BTKH, value_BTKH, window, scale, logit_softcap)
    T, H = query_BTNH.shape[1], query_BTNH.shape[-1]
    reach = min(window or T, T)
    cap = None if logit_softcap is None else float(logit_softcap)
    if tiles is None:
        device, itemsize = gpu_blocks.device_class(), query_BTNH.dtype.itemsize
        tiles = gpu_blocks.tiles_for(device, H, reach, itemsize)
    problem = Problem(T, reach, Scores(float(scale), cap, interpret), tiles)
    segments = None if query_segments_BT is None else (query_segments_BT, key_segments_BT)
    return _attention(problem, query_BTNH, key_BTKH, value_BTKH, sinks_N, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(problem, query_BTNH, key_BTKH, value_BTKH, sinks_N, segments):
    return forward(problem, query_BTNH, key_BTKH, value_BTKH, sinks_N, segments)[0]


def _forward(problem, *inputs):
    out_BTNH, lse_BNT = forward(problem, *inputs)
    return out_BTNH, (*inputs, out_BTNH, lse_BNT)


def _backward(problem, saved, dout_BTNH):
    return *backward(problem, *saved, dout_BTNH), None


_attention.defvjp(_forward, _backward)


def _check(query_BTNH, key_BTKH, value_BTKH, window, scale, logit_softcap) -> None:
    H = query_BTNH.shape[-1]
    if H & (H - 1) or not 16 <= H <= 256:
        raise ValueError(f"pallas_gpu: head size {H}: must be a power of two from 16 to 256")
    dtype = query_BTNH.dtype
    if dtype not in DTYPES or not dtype == key_BTKH.dtype == value_BTKH.dtype:
        raise ValueError(
            f"pallas_gpu: dtypes {dtype}, {key_BTKH.dtype}, {value_BTKH.dtype}: must be one of"
            " bfloat16, float16, float32 for all three"
        )
    if query_BTNH.shape[1] != key_BTKH.shape[1]:
        raise ValueError(
            f"pallas_gpu: {query_BTNH.shape[1]} queries for {key_BTKH.shape[1]} keys: must be equal"
        )
    if window is not None and window < 1:
        raise ValueError(f"pallas_gpu: window={window}: must be at least 1 (self), or None for all")
    if not scale > 0:
        raise ValueError(f"pallas_gpu: scale={scale}: must be positive")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"pallas_gpu: logit_softcap={logit_softcap}: must be positive, or None")
