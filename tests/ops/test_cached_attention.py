"""Attention over caches, however the tokens came in, against the dense mask over the whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops import cached_attention
from lightning_jax.ops.cached_attention import attend
from lightning_jax.ops.kv_cache import KV, Chunk, Full, Ring

B, N, K, H = 3, 4, 2, 8
LENGTH, WINDOW = 30, 7


@functools.cache
def rows():
    """Queries, keys, values and documents of whole rows; the last row ends early."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, LENGTH, heads, H)) for heads in (N, K, K))
    segment_BT = np.ones((B, LENGTH), np.int32)
    segment_BT[0, 11:] = 2
    segment_BT[2, 17:] = 0
    return query, key, value, segment_BT


def oracle(window, sinks_N):
    """The answer to every query in float64."""
    query, key, value, segment = rows()
    key, value = (np.repeat(x, N // K, axis=2) for x in (key, value))
    scores = np.einsum("BTNH,BSNH->BNTS", query, key) * H**-0.5
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
    visible = (distance >= 0) & (distance < (window or LENGTH))
    visible = visible & (segment[:, :, None] == segment[:, None]) & (segment != 0)[:, None]
    weights = np.exp(scores) * visible[:, None]
    total = weights.sum(-1) + (0 if sinks_N is None else np.exp(sinks_N)[None, :, None])
    out = np.einsum("BNTS,BSNH->BTNH", weights, value)
    return out / np.where(total == 0, 1, total).transpose(0, 2, 1)[..., None]


@functools.partial(jax.jit, static_argnames=("window", "implementation"))
def step(cache, query, kv, chunk, sinks_N, window, implementation):
    cache, view = cache.update(kv, jnp.int32(1), chunk, window)
    # Keys at hand are attended to by ops.attention, which has other implementations.
    named = implementation if hasattr(view, "chunk") else None
    return cache, attend(query, view, sinks_N=sinks_N, implementation=named)


def answers(cache, widths, window, sinks_N, implementation, dtype="float32"):
    query, key, value, segment_BT = (
        jnp.asarray(x, x.dtype if x.dtype == np.int32 else dtype) for x in rows()
    )
    out, start = np.zeros((B, LENGTH, N, H)), 0
    before_BS = jnp.zeros((B, cache.size), jnp.int32)
    for width in widths:
        here = slice(start, start + width)
        chunk = Chunk.append(jnp.full(B, start, jnp.int32), segment_BT[:, here], before_BS)
        kv = KV(key[:, here], value[:, here])
        cache, made = step(cache, query[:, here], kv, chunk, sinks_N, window, implementation)
        out[:, here], before_BS, start = made, chunk.after_BS, start + width
    return out


CACHES = {"ring": (Ring, WINDOW, WINDOW), "full": (Full, LENGTH, None), "wide": (Full, 41, WINDOW)}
WIDTHS = {"one by one": (1,) * LENGTH, "chunks": (9, 9, 9, 3), "whole": (LENGTH,)}


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("kind", CACHES)
def test_any_way_in_gives_the_dense_answer(kind, widths, implementation, monkeypatch):
    # Several blocks, of which the last overlaps the one before it.
    monkeypatch.setattr(cached_attention, "block_size", lambda rows, size: min(size, 4))
    make, size, window = CACHES[kind]
    cache = make.init(2, B, size, K, H, "float32")
    sinks_N = jnp.linspace(-1.0, 1.0, N) if kind == "ring" else None
    got = answers(cache, widths, window, sinks_N, implementation)
    np.testing.assert_allclose(got, oracle(window, sinks_N), atol=2e-6)
    assert not got[2, 17:].any()


def test_bfloat16_is_as_near_as_its_keys():
    cache = Full.init(2, B, LENGTH, K, H, "bfloat16")
    got = answers(cache, (9, 9, 9, 3), None, None, "blocked", "bfloat16")
    np.testing.assert_allclose(got, oracle(None, None), atol=0.03)


def test_the_decode_kernels_read_the_same_cache(monkeypatch):
    """In interpret mode, through the same call as on their devices."""
    from lightning_jax.ops.kernels.tpu import decode

    kernel = functools.partial(decode.ring_decode, interpret=True)
    monkeypatch.setattr(decode, "ring_decode", kernel)
    cache = Full.init(2, B, LENGTH, K, H, "float32")
    got = answers(cache, (9, 9, 9, 3), None, None, "pallas_tpu")
    np.testing.assert_allclose(got, oracle(None, None), atol=2e-5)


def test_names_are_checked_and_nothing_falls_back():
    cache, _ = Full.init(1, 1, 4, K, H, "float32"), None
    chunk = Chunk.append(jnp.zeros(1, jnp.int32), jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 4)))
    _, view = cache.update(KV(*(jnp.ones((1, 1, K, H)),) * 2), jnp.int32(0), chunk, None)
    with pytest.raises(ValueError, match="xla_banded.*one of reference, blocked"):
        attend(jnp.ones((1, 1, N, H)), view, implementation="xla_banded")


def test_cost_follows_filled_keys_and_blocks_fit():
    assert cached_attention.block_size(4, 16384) == 256
    assert cached_attention.block_size(512, 16384) == 512
    assert cached_attention.block_size(512, 100) == 100
