"""Attention of others behind our signature, for comparison: JAX's splash kernel, and cuDNN's.

Both take a causal window over aligned rows; what else `ops.attention` defines they do otherwise
(splash lets padding see padding) or not at all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

# Best of those measured, forward and forward with backward (kernels_tpu suite): twice as fast as
# 256, six times as fast as splash's default.
_SPLASH_BLOCK = 512
_SPLASH_LANES = 128


def splash_attention(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    *,
    window: int | None,
    scale: float,
    logit_softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention (TPU) with blocks of 512: causal, `window` visible keys.

    Returns:
        out_BTNH in the dtype of the queries, which carry the scale in their own dtype.
    """
    T, N = query_BTNH.shape[1:3]
    length = -(-T // _SPLASH_LANES) * _SPLASH_LANES
    block = next(size for size in (_SPLASH_BLOCK, 256, _SPLASH_LANES) if length % size == 0)
    shape = length, length
    if window is not None and window < T:
        mask = splash_mask.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = splash_mask.CausalMask(shape)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute"
    sizes = splash_kernel.BlockSizes(
        **dict.fromkeys(names.split(), block), use_fused_bwd_kernel=True
    )
    attend = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=logit_softcap,
        interpret=interpret,
    )

    def heads_first(x_BTNH):
        return jnp.pad(x_BTNH, ((0, 0), (0, length - T), (0, 0), (0, 0))).swapaxes(1, 2)

    scaled_BTNH = (query_BTNH.astype(jnp.float32) * scale).astype(query_BTNH.dtype)
    out_BNTH = jax.vmap(attend)(*map(heads_first, (scaled_BTNH, key_BTKH, value_BTKH)))
    return out_BNTH.swapaxes(1, 2)[:, :T]


def cudnn_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    window: int | None,
    scale: float,
) -> jax.Array:
    """cuDNN's fused attention (NVIDIA GPUs) through `jax.nn`: causal, `window` visible keys.

    Returns:
        out_BTNH in the dtype of the queries, which must be bfloat16 or float16.
    """
    return jax.nn.dot_product_attention(
        query_BTNH,
        key_BSKH,
        value_BSKH,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
