"""Attention of a chunk of queries over a cache that holds their keys: one call for every view.

Cost follows the keys that are filled, not the size of the cache, and no length recompiles: the loop
over blocks of keys runs a dynamic number of times.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax.config.errors import suggest
from lightning_jax.ops.attention import dot_product_attention
from lightning_jax.ops.kernels.common import FLOOR, HIDDEN, precision
from lightning_jax.ops.kernels.cpu import narrow
from lightning_jax.ops.kv_cache import Fresh, Stored, slot_positions
from lightning_jax.ops.mask import EMPTY_POSITION, Mask
from lightning_jax.runtime import target

logger = logging.getLogger(__name__)

_KERNELS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
IMPLEMENTATIONS = ("reference", "blocked", *_KERNELS)


def attend(
    query_BTNH: jax.Array,
    view: Fresh | Stored,
    *,
    sinks_N: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of queries to the keys of a view, their own or a cache's (see `ops.kv_cache`).

    Args:
      query_BTNH: rotated queries.
      view: keys and values, from the layer that owns them.
      sinks_N: a logit per head that joins only the softmax denominator.
      implementation: of `ops.attention.dot_product_attention` for keys at hand; for stored ones
        "reference" (all slots at once), "blocked" (filled blocks, plain XLA), "pallas_tpu" or
        "pallas_gpu" (the decode kernels). None chooses.

    Returns:
      out_BTNH in the dtype of the queries; exactly 0 for a query of padding.

    Raises:
      ValueError: an implementation that is unknown or cannot honour the call.
    """
    if isinstance(view, Fresh):
        kv, mask = view.kv, view.mask
        return dot_product_attention(
            query_BTNH,
            kv.key_BSKH,
            kv.value_BSKH,
            mask,
            sinks_N=sinks_N,
            implementation=implementation,
        )
    if implementation is None:
        arrays = query_BTNH, view.cache.key_UBSKH
        shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        implementation = _choose(target.current().platform, *shapes)
    if implementation not in IMPLEMENTATIONS:
        known = suggest(implementation, IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r}: expected {known} for a cache")
    if implementation == "blocked":
        return _blocked(query_BTNH, view, sinks_N)
    return _over_all_slots(query_BTNH, view, sinks_N, implementation)


@functools.cache
def _choose(
    platform: str, query_BTNH: jax.ShapeDtypeStruct, key_UBSKH: jax.ShapeDtypeStruct
) -> str:
    # Cached so that each kind of call is logged once, however often it is traced.
    choice = f"pallas_{platform}"
    if choice not in _KERNELS or not _kernel(choice).fits(query_BTNH, key_UBSKH):
        choice = "blocked"
    logger.debug(
        "attention to a cache: %s on %s for queries %s and keys %s",
        choice,
        platform,
        query_BTNH.shape,
        key_UBSKH.shape,
    )
    return choice


def _kernel(implementation: str) -> Any:
    """The module of a decode kernel; imported when first used, since Pallas takes a second."""
    return importlib.import_module(f"lightning_jax.ops.kernels.{_KERNELS[implementation]}.decode")


def _over_all_slots(query_BTNH, view, sinks_N, implementation):
    """The dense mask over all slots, or a decode kernel, which takes the same arguments."""
    chunk, size = view.chunk, view.cache.size
    key_BS = slot_positions(chunk.last_B, jnp.arange(size, dtype=jnp.int32), size)
    key_BS = jnp.where((key_BS < 0) | (chunk.after_BS == 0), EMPTY_POSITION, key_BS)
    arguments: dict[str, Any] = {
        "query_positions_BT": chunk.position_BT,
        "key_positions_BS": key_BS,
        "query_segments_BT": chunk.segment_BT,
        "key_segments_BS": chunk.after_BS,
        "window": view.window,
    }
    if implementation == "reference":
        kv = view.cache.read(view.unit)
        return dot_product_attention(
            query_BTNH,
            kv.key_BSKH,
            kv.value_BSKH,
            Mask(**arguments),
            sinks_N=sinks_N,
            implementation="reference",
        )
    # In place: a unit that is sliced out for a kernel would be copied, all its slots.
    return _kernel(implementation).ring_decode(
        query_BTNH,
        view.cache.key_UBSKH,
        view.cache.value_UBSKH,
        unit=view.unit,
        sinks_N=sinks_N,
        scale=query_BTNH.shape[-1] ** -0.5,
        **arguments,
    )


def block_size(rows: int, size: int) -> int:
    """Keys per block for `rows` query rows (positions x heads per key head) and `size` slots.

    Measured on two AVX2 cores, float32, 8 query heads of 64 over 2 key heads, milliseconds over
    16,384 filled keys:

        rows    128     256     512     1024
        4       3.3     3.4     3.0     2.4     (200 filled: 0.13, 0.11, 0.18, 0.26)
        512     72      40      35      37
        2048    272     262     284     371
    """
    return min(size, 512 if 256 <= rows <= 1024 else 256)


def _blocked(query_BTNH, view, sinks_N):
    """A running softmax (Milakov & Gimelshein, arXiv:1805.02867) over blocks of filled slots."""
    cache, dtype = view.cache, query_BTNH.dtype
    (B, T, N, H), K = query_BTNH.shape, cache.key_UBSKH.shape[3]
    block = block_size(T * N // K, cache.size)
    query_BKGTH = (
        narrow.operand(query_BTNH, dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    )

    def visit(index, state, *, masked=True):
        top_BKGT, total_BKGT, sum_BKGTH = state
        # The last block of a cache may overlap the one before it, whose keys it then hides.
        start = jnp.minimum(index * block, cache.size - block)
        key_BSKH, value_BSKH = (_slots(cache, x, view.unit, start, block, dtype) for x in (0, 1))
        scores_BKGTS = H**-0.5 * jnp.einsum(
            "BKGTH,BSKH->BKGTS",
            query_BKGTH,
            key_BSKH,
            precision=precision(dtype),
            preferred_element_type=jnp.float32,
        )
        if masked:
            slot_S = start + jnp.arange(block, dtype=jnp.int32)
            visible_BTS = _visible(view, slot_S) & (slot_S >= index * block)[None, None]
            scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, HIDDEN)
        new_top_BKGT = jnp.maximum(top_BKGT, jnp.max(scores_BKGTS, axis=-1))
        weights_BKGTS = jnp.exp(scores_BKGTS - new_top_BKGT[..., None])
        decay_BKGT = jnp.exp(top_BKGT - new_top_BKGT)
        seen_BKGTH = jnp.einsum(
            "BKGTS,BSKH->BKGTH",
            weights_BKGTS.astype(value_BSKH.dtype),
            value_BSKH,
            precision=precision(dtype),
            preferred_element_type=jnp.float32,
        )
        total_BKGT = decay_BKGT * total_BKGT + jnp.sum(weights_BKGTS, axis=-1)
        return new_top_BKGT, total_BKGT, decay_BKGT[..., None] * sum_BKGTH + seen_BKGTH

    rows = (B, K, N // K, T)
    top_BKGT = jnp.full(rows, FLOOR, jnp.float32)
    total_BKGT = jnp.zeros(rows, jnp.float32)
    if sinks_N is not None:
        # A sink is a key that is always visible and has no value.
        sinks_KG1 = sinks_N.astype(jnp.float32).reshape(K, N // K, 1)
        top_BKGT, total_BKGT = jnp.broadcast_to(sinks_KG1[None], rows), total_BKGT + 1
    state = top_BKGT, total_BKGT, jnp.zeros((*rows, H), jnp.float32)

    def step(index, state):
        # Comparing all pairs is a tenth of a long prefill's attention; most blocks need no mask.
        plain = functools.partial(visit, masked=False)
        return lax.cond(_all_visible(view, index * block, block), plain, visit, index, state)

    loop = step if T > 1 and view.window is None else visit
    _, total_BKGT, sum_BKGTH = lax.fori_loop(0, _blocks(view, block), loop, state)
    out_BKGTH = sum_BKGTH / jnp.where(total_BKGT > 0, total_BKGT, 1)[..., None]
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(dtype)


def _blocks(view, block):
    """Blocks up to the last slot that some query of the batch can see."""
    seen_BT = jnp.where(view.chunk.segment_BT != 0, view.chunk.position_BT + 1, 0)
    return -(-jnp.minimum(jnp.max(seen_BT), view.cache.size) // block)


def _slots(cache, which, unit, start, block, dtype):
    """Keys (0) or values (1) of one block of slots of a unit, as operands of a product."""
    x_UBSKH = (cache.key_UBSKH, cache.value_UBSKH)[which]
    _, B, _, K, H = x_UBSKH.shape
    x_BSKH = lax.dynamic_slice(x_UBSKH, (unit, 0, start, 0, 0), (1, B, block, K, H))[0]
    return narrow.operand(narrow.from_bits(x_BSKH, jnp.dtype(cache.dtype)), dtype)


def _visible(view, slot_S):
    """Which of some consecutive slots each query sees."""
    chunk = view.chunk
    key_BS = slot_positions(chunk.last_B, slot_S, view.cache.size)
    segment_BS = lax.dynamic_slice_in_dim(chunk.after_BS, slot_S[0], len(slot_S), axis=1)
    distance_BTS = chunk.position_BT[:, :, None] - key_BS[:, None]
    visible_BTS = (distance_BTS >= 0) & (key_BS >= 0)[:, None] & (segment_BS != 0)[:, None]
    visible_BTS &= chunk.segment_BT[:, :, None] == segment_BS[:, None]
    return visible_BTS if view.window is None else visible_BTS & (distance_BTS < view.window)


def _all_visible(view, start, block):
    """Whether every query sees all of a block: keys of one document, before the first query."""
    chunk, size = view.chunk, view.cache.size
    segment_BS = lax.dynamic_slice_in_dim(chunk.after_BS, start, block, axis=1)
    document_B1 = chunk.segment_BT[:, :1]
    one_document = (chunk.segment_BT == document_B1).all() & (segment_BS == document_B1).all()
    is_before = (start + block <= chunk.start_B).all() & (chunk.last_B < size).all()
    return one_document & is_before & (document_B1 != 0).all()
