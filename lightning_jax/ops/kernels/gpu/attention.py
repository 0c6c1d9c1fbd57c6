"""Sliding-window attention for GPUs: the differentiable op over the Pallas Triton kernels.

Triton runs on everything from Ampere on. JAX 0.11 calls its Triton back end deprecated in favour of
Mosaic GPU, which compiles for Hopper and Blackwell alone; the kernels compile with 0.10 and 0.11.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lightning_jax.ops.kernels import common
from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks
from lightning_jax.ops.kernels.gpu.backward import backward
from lightning_jax.ops.kernels.gpu.blocks import Band, Tiles
from lightning_jax.ops.kernels.gpu.forward import Problem, Scores, forward

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


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
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Causal grouped-query attention: query t, which is key s = t + offset, sees s-window+1 .. s.

    For NVIDIA GPUs from Ampere on. Differentiable (reverse mode only) in query, key, value and
    sinks; time grows with queries x window. Only blocks inside the window, and of documents that
    meet, are visited. Keys that no query sees get gradients of exactly 0. Equal inputs give equal
    bits.

    Args:
        query_BTNH: queries; N is a multiple of K; H is a power of two from 16 to 256.
        key_BSKH: keys, S = T + `query_offset`.
        value_BSKH: values.
        window: visible keys per query, self included; None for all.
        query_segments_BT: int32, document of each query, [B, T] or [1, T]; 0 is padding, which
            sees nothing. None together with `key_segments_BS` means one document.
        key_segments_BS: document of each key, [B, S] or [1, S]; 0 is padding, which nobody sees.
        sinks_N: per head logit that joins the softmax denominator only.
        scale: factor of the scores, positive.
        logit_softcap: c in c x tanh(logit / c) (Gemma 2, arXiv:2408.00118), applied to the scaled
            scores, not to sinks; None: no soft-cap.
        query_offset: keys before the first query.
        interpret: run as plain JAX on any device, for tests.
        tiles: block sizes; by device, head size and window from a table by default.

    Returns:
        out_BTNH in the dtype of the queries; exactly 0 where a query sees nothing, which then sends
        no gradient anywhere. Scores, softmax and sums are float32, products take their operands in
        the input dtype (float32 ones are not rounded to TF32).

    Raises:
        ValueError: a head size, dtype, scale, soft-cap, window or offset that the kernels cannot
            honour; another number of keys than T + offset.
    """
    (T, _, H), S = query_BTNH.shape[1:], key_BSKH.shape[1]
    common.check_head_size("pallas_gpu", H, common.TRITON_HEAD_SIZES)
    common.check_dtypes("pallas_gpu", (query_BTNH, key_BSKH, value_BSKH), DTYPES)
    common.check_band("pallas_gpu", T, S, window, query_offset)
    common.check_scores("pallas_gpu", scale, logit_softcap)
    reach = min(window or S, S)
    cap = None if logit_softcap is None else float(logit_softcap)
    if tiles is None:
        device, itemsize = gpu_blocks.device_class(), query_BTNH.dtype.itemsize
        tiles = gpu_blocks.tiles_for(device, H, reach, itemsize)
    problem = Problem(Band(T, query_offset, reach), Scores(float(scale), cap, interpret), tiles)
    segments = None if query_segments_BT is None else (query_segments_BT, key_segments_BS)
    return _attention(problem, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(problem, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments):
    return forward(problem, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments)[0]


def _forward(problem, *inputs):
    out_BTNH, lse_BNT = forward(problem, *inputs)
    return out_BTNH, (*inputs, out_BTNH, lse_BNT)


def _backward(problem, saved, dout_BTNH):
    return *backward(problem, *saved, dout=dout_BTNH), None


_attention.defvjp(_forward, _backward)
