"""JAX's splash attention made measurable: arithmetic in place of its look-ups.

Splash reads the blocks to visit from tables in scalar memory, which the static profiler takes for
zeros: it would see every block skipped. The vector code is untouched.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


def block_sizes(query: int, key: int, compute: int) -> kernel.BlockSizes:
    """Equal blocks for all passes; the backward passes fused."""
    return kernel.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=compute,
        block_q_dkv=query,
        block_kv_dkv=key,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )


def attention(heads: int, length: int, window: int, sizes: kernel.BlockSizes):
    """Returns a function of q, k, v `[heads, length, head size]`, for a causal window."""
    local = masks.LocalMask((length, length), (window - 1, 0), 0)
    return kernel.make_splash_mha(
        masks.MultiHeadMask([local] * heads), head_shards=1, q_seq_shards=1, block_sizes=sizes
    )


def visited(length: int, window: int, query: int, key: int) -> int:
    """Blocks of scores of a head that hold a visible pair."""
    count = 0
    for start in range(0, length, query):
        count += (start + query - 1) // key - max(0, start - window + 1) // key + 1
    return count


@contextlib.contextmanager
def arithmetic(length: int, window: int, sizes: kernel.BlockSizes) -> Iterator[None]:
    """A context in which splash computes the next block from its grid indices."""
    original = kernel._next_nonzero

    def shift(x, size):
        # The profiler does not know divisions; all sizes are powers of two.
        return lax.shift_right_arithmetic(
            jnp.asarray(x, jnp.int32), jnp.int32(size.bit_length() - 1)
        )

    def next_nonzero(h, i, j, *tables, next_i=False):
        if next_i:
            # Keys outside, queries inside, the whole grid: a skipped step keeps the last block.
            size = sizes.block_q_dkv, sizes.block_kv_dkv
            first = shift(j * size[1], size[0])
            last = shift((j + 1) * size[1] + window - 2, size[0])
            last = jnp.minimum(last, length // size[0] - 1)
            run, block = (i >= first) & (i <= last), jnp.clip(i, first, last)
        else:
            size = sizes.block_q, sizes.block_kv
            if "_splash_attention_bwd_dkv" in _callers():
                size = sizes.block_q_dkv, sizes.block_kv_dkv
            first = shift(jnp.maximum(0, i * size[0] - window + 1), size[1])
            last = shift((i + 1) * size[0] - 1, size[1])
            run, block = first + j <= last, jnp.minimum(first + j, last)
        return block, None, run, run != run

    kernel._next_nonzero = next_nonzero
    try:
        yield
    finally:
        kernel._next_nonzero = original


def _callers() -> set[str]:
    names, frame = set(), sys._getframe(1)
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def forward(heads: int, length: int, window: int, sizes: kernel.BlockSizes):
    """The forward pass, as a function of q, k, v."""

    def call(query, key, value):
        with arithmetic(length, window, sizes):
            return attention(heads, length, window, sizes)(query, key, value)

    return call


def forward_and_backward(heads: int, length: int, window: int, sizes: kernel.BlockSizes):
    """Output gradients to gradients, as a function of q, k, v and the output's gradient."""

    def call(query, key, value, dout):
        with arithmetic(length, window, sizes):
            return jax.vjp(attention(heads, length, window, sizes), query, key, value)[1](dout)

    return call
