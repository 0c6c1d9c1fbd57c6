"""Attention kernels of others behind our signature, for comparison: JAX's splash, and cuDNN's.

Both take a causal window over aligned rows; splash also takes queries that are the last of the
keys. They lack the other features of `ops.attention`, or define them differently (in splash,
padding sees padding).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

# The best block size measured, forward and forward with backward (kernels_tpu suite): twice as fast
# as 256, six times as fast as splash's default.
_SPLASH_BLOCK = 512
_SPLASH_LANES = 128


def splash_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    window: int | None,
    scale: float,
    logit_softcap: float | None = None,
    query_offset: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention (TPU) with blocks of 512: causal, `window` visible keys.

    Query t is key t + `query_offset`.

    Returns:
        out_BTNH in the dtype of the queries, which carry the scale in their own dtype.
    """
    (T, N), S = query_BTNH.shape[1:3], key_BSKH.shape[1]
    # Padding lies behind all keys that a query sees.
    rows, columns = (-(-length // _SPLASH_LANES) * _SPLASH_LANES for length in (T, S))
    shape = rows, columns
    if window is not None and window < S:
        mask = splash_mask.LocalMask(shape, (window - 1, 0), query_offset)
    else:
        mask = splash_mask.CausalMask(shape, query_offset)
    query_block, key_block = (
        next(size for size in (_SPLASH_BLOCK, 256, _SPLASH_LANES) if length % size == 0)
        for length in shape
    )
    sizes = splash_kernel.BlockSizes(
        **dict.fromkeys(("block_q", "block_q_dkv"), query_block),
        **dict.fromkeys(
            ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute"), key_block
        ),
        use_fused_bwd_kernel=True,
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
        padding = -x_BTNH.shape[1] % _SPLASH_LANES
        return jnp.pad(x_BTNH, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)

    scaled_BTNH = (query_BTNH.astype(jnp.float32) * scale).astype(query_BTNH.dtype)
    out_BNTH: Any = jax.vmap(attend)(*map(heads_first, (scaled_BTNH, key_BSKH, value_BSKH)))
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
