"""Peers for the same attention on a GPU, ready to be timed.

Each builder takes the arrays of `kernels_gpu` and returns a call that queues one pass and waits for
nothing. Only flex_attention has window, packed segments and grouped heads together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import compiled, peer

Arrays = list[jax.Array]


def cudnn(passes: str, arrays: Arrays, segments_BT: jax.Array, window: int) -> Callable[[], Any]:
    """cuDNN through `jax.nn`: the same window, all of a row in one document."""

    def attend(query, key, value):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            local_window_size=(window - 1, 0),
            implementation="cudnn",
        )

    call = compiled(attend, passes, arrays)
    return lambda: call(*arrays)


def jax_pallas(
    passes: str, arrays: Arrays, segments_BT: jax.Array, window: int
) -> Callable[[], Any]:
    """JAX's own Pallas attention: packed segments, every earlier key, keys repeated per head."""
    from jax.experimental.pallas.ops.gpu import attention

    query, key, value, dout = arrays
    groups = query.shape[2] // key.shape[2]
    repeated = [query, jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2), dout]

    def attend(query, key, value):
        return attention.mha(
            query, key, value, segments_BT, sm_scale=query.shape[-1] ** -0.5, causal=True
        )

    call = compiled(attend, passes, repeated)
    return lambda: call(*repeated)


def torch_flex(
    passes: str, arrays: Arrays, segments_BT: jax.Array, window: int
) -> Callable[[], Any]:
    """torch's compiled flex_attention: the same window, the same packed segments."""
    torch = peer("torch")
    flex = peer("torch.nn.attention.flex_attention")
    segments = torch.from_dlpack(segments_BT)
    B, length = segments_BT.shape

    def visible(batch, head, t, s):
        same = segments[batch, t] == segments[batch, s]
        return (t >= s) & (t - s < window) & same

    mask = flex.create_block_mask(visible, B, None, length, length, device="cuda", _compile=True)
    attention = torch.compile(flex.flex_attention)

    def attend(query, key, value):
        return attention(query, key, value, block_mask=mask, enable_gqa=True)

    return _torch_call(torch, attend, passes, arrays)


def torch_sdpa(
    passes: str, arrays: Arrays, segments_BT: jax.Array, window: int
) -> Callable[[], Any]:
    """torch's scaled_dot_product_attention: every earlier key, one document."""
    torch = peer("torch")

    def attend(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    return _torch_call(torch, attend, passes, arrays)


def _torch_call(torch: Any, attend: Any, passes: str, arrays: Arrays) -> Callable[[], Any]:
    tensors = [torch.from_dlpack(a).transpose(1, 2).contiguous() for a in arrays]
    query, key, value, dout = tensors
    if passes == "forward":

        def forward() -> None:
            with torch.no_grad():
                attend(query, key, value)

        return forward
    leaves = [leaf.requires_grad_(True) for leaf in (query, key, value)]

    def both() -> None:
        torch.autograd.grad(attend(*leaves), leaves, dout)

    return both


def wait_for_torch() -> None:
    """Waits until torch's queue on the GPU is empty."""
    peer("torch").cuda.synchronize()


JAX_PEERS = {"cudnn": cudnn, "jax_pallas": jax_pallas}
TORCH_PEERS = {"torch_flex": torch_flex, "torch_sdpa": torch_sdpa}
