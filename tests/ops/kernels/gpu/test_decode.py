"""The GPU decode kernel in interpret mode, against the dense softmax over all slots in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.kernels.gpu.decode import paged_decode, ring_decode
from lightning_jax.ops.mask import EMPTY_POSITION
from tests.ops.kernels.dense_attention import dense_attention

# Interpreted kernels take long.
pytestmark = pytest.mark.slow

SCALE = 0.3


def _ring(last, slots, window, T, rng):
    """Rings in which the row's positions up to `last` were written, and the last T as queries.

    A row with `last` of -1 is empty. Every ring's oldest token belongs to an earlier document.
    """
    B = len(last)
    stored = np.full((B, slots), EMPTY_POSITION, np.int32)
    segments = np.zeros((B, slots), np.int32)
    for row, end in enumerate(last):
        for position in range(max(0, end - slots + 1), end + 1):
            stored[row, position % slots] = position
            segments[row, position % slots] = 1 if position == max(0, end - slots + 1) else 2
    queries = np.maximum(last[:, None] - np.arange(T)[::-1], -1).astype(np.int32)
    query_segments = np.where(queries < 0, 0, 2).astype(np.int32)
    distance = queries[:, :, None] - stored[:, None].astype(np.int64)
    visible = (distance >= 0) & (distance < (window or slots))
    visible &= (query_segments[:, :, None] == segments[:, None]) & (segments != 0)[:, None]
    return stored, segments, queries, query_segments, visible


def _quantized(x, rng):
    scales = np.abs(x).max(-1) / 127
    return np.round(x / scales[..., None]).astype(np.int8), scales.astype(np.float32)


def _expected(query, key, value, visible, **options):
    dout = np.zeros(query.shape)
    return dense_attention(query, key, value, dout, visible_BTS=visible, scale=SCALE, **options)[0]


@pytest.mark.parametrize(
    "slots, window, T, N, K",
    [(512, 512, 1, 8, 1), (100, 90, 3, 4, 4), (64, None, 1, 8, 2)],
)
def test_ring_reads_what_the_dense_mask_shows(slots, window, T, N, K):
    rng = np.random.default_rng(slots)
    last = np.array([slots + 7, 5, -1, 3 * slots - 1, 0]) if window else np.array([60, 0, -1])
    stored, segments, queries, query_segments, visible = _ring(last, slots, window, T, rng)
    B, H = len(last), 16
    query, key, value = (
        rng.normal(size=shape) for shape in ((B, T, N, H), (B, slots, K, H), (B, slots, K, H))
    )
    sinks = np.linspace(-1.0, 2.0, N)
    out = jax.jit(
        lambda *arrays: ring_decode(
            *arrays,
            query_positions_BT=queries,
            key_positions_BS=stored,
            query_segments_BT=query_segments,
            key_segments_BS=segments,
            window=window,
            sinks_N=jnp.asarray(sinks),
            scale=SCALE,
            interpret=True,
        )
    )(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)))
    expected = _expected(query, key, value, visible, sinks=sinks)
    np.testing.assert_allclose(out, expected, 2e-5, 2e-5)
    assert (np.asarray(out)[last < 0] == 0).all()


@pytest.mark.parametrize(
    "slots, window, packed, quantize",
    [(128, 100, True, False), (64, None, False, True), (50, None, True, True)],
)
def test_a_unit_of_a_stack_has_the_bits_of_its_slice(slots, window, packed, quantize):
    rng = np.random.default_rng(slots)
    units, T, N, K, H = 3, 2, 4, 2, 16
    last = np.array([3 * slots + 5 if window else slots - 1, 7])
    B = len(last)
    stored, segments, queries, query_segments, _ = _ring(last, slots, window, T, rng)
    named = {"query_positions_BT": queries, "key_positions_BS": stored}
    if packed:
        named |= {"query_segments_BT": query_segments, "key_segments_BS": segments}
    query = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    cache = [rng.normal(size=(units, B, slots, K, H)).astype(np.float32) for _ in range(2)]
    scales = {}
    if quantize:
        cache, (key_scales, value_scales) = zip(*(_quantized(x, rng) for x in cache), strict=True)
        scales = {"key_scales_BSK": key_scales, "value_scales_BSK": value_scales}
    decode = jax.jit(functools.partial(ring_decode, window=window, scale=SCALE, interpret=True))
    seen = []
    for unit in range(units):
        alone = {name: x[unit] for name, x in scales.items()}
        expected = decode(query, *(x[unit] for x in cache), **alone, **named)
        seen.append(np.asarray(decode(query, *cache, unit=jnp.int32(unit), **scales, **named)))
        np.testing.assert_array_equal(seen[-1], expected)
    assert not (seen[0] == seen[1]).any()


@pytest.mark.parametrize(
    "window, T, quantize, softcap", [(None, 1, False, None), (40, 2, True, 3.0), (1, 1, True, None)]
)
def test_pages_in_any_order(window, T, quantize, softcap):
    rng = np.random.default_rng(T)
    page, J, N, K, H = 16, 20, 8, 2, 16
    last = np.array([300, 0, 17, -1])
    B, capacity = len(last), page * J
    pages = rng.permutation(B * J).reshape(B, J).astype(np.int32)
    query = rng.normal(size=(B, T, N, H))
    key, value = (rng.normal(size=(B * J, page, K, H)) for _ in range(2))
    scales = {}
    cache, exact = [key, value], [key, value]
    if quantize:
        pairs = [_quantized(x, rng) for x in cache]
        cache = [quantized for quantized, _ in pairs]
        exact = [quantized * scale[..., None] for quantized, scale in pairs]
        scales = {"key_scales": pairs[0][1], "value_scales": pairs[1][1]}
    queries = np.maximum(last[:, None] - np.arange(T)[::-1], -1).astype(np.int32)
    distance = queries[:, :, None] - np.arange(capacity)
    visible = (distance >= 0) & (distance < (window or capacity)) & (queries >= 0)[..., None]
    dtype = None if quantize else jnp.float32
    if not quantize:
        # What no query sees may hold anything: it is not read.
        cache = [x.copy() for x in cache]
        for row, end in enumerate(last):
            unseen = np.arange(end + 1, capacity)
            for x in cache:
                x[pages[row, unseen // page], unseen % page] = np.nan
    out = jax.jit(
        lambda query, key, value: paged_decode(
            query,
            key,
            value,
            query_positions_BT=queries,
            pages_BJ=pages,
            window=window,
            scale=SCALE,
            logit_softcap=softcap,
            interpret=True,
            **scales,
        )
    )(jnp.asarray(query, jnp.float32), *(jnp.asarray(x, dtype) for x in cache))
    rows = [x[pages].reshape(B, capacity, K, H) for x in exact]
    expected = _expected(query, *rows, visible, softcap=softcap)
    np.testing.assert_allclose(out, expected, 2e-5, 2e-5)


def test_bfloat16_and_same_bits():
    rng = np.random.default_rng(0)
    stored, segments, queries, query_segments, visible = _ring(np.array([150]), 128, 128, 1, rng)
    shapes = (1, 1, 4, 64), (1, 128, 1, 64), (1, 128, 1, 64)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    run = jax.jit(
        lambda *arrays: ring_decode(
            *arrays,
            query_positions_BT=queries,
            key_positions_BS=stored,
            window=128,
            scale=SCALE,
            interpret=True,
        )
    )
    out = run(*arrays)
    assert out.dtype == jnp.bfloat16
    assert np.array_equal(out, run(*arrays))
    expected = _expected(*arrays, (stored <= 150)[:, None])
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, 4e-2, 4e-2)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"T": 40}, "40 queries of 4 heads"),
        ({"H": 48}, "head size 48"),
        ({"cache": jnp.int8}, "key cache of int8"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"unit": jnp.int32(0)}, r"\(1, 64, 1, 16\) with a unit: must be UBSKH"),
    ],
)
def test_what_it_cannot_honour_is_named(changes, match):
    H, T = changes.get("H", 16), changes.get("T", 1)
    query = jnp.zeros((1, T, 4, H))
    cache = jnp.zeros((1, 64, 1, H), changes.get("cache", jnp.float32))
    with pytest.raises(ValueError, match=match):
        ring_decode(
            query,
            cache,
            cache,
            query_positions_BT=jnp.zeros((1, T), jnp.int32),
            key_positions_BS=jnp.zeros((1, 64), jnp.int32),
            window=8,
            scale=changes.get("scale", 1.0),
            unit=changes.get("unit"),
        )
