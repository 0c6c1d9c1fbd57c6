"""The TPU decode kernels, interpreted, against the dense softmax over all slots in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lightning_jax.ops.kernels.tpu.decode import fits, paged_decode, ring_decode
from lightning_jax.ops.mask import EMPTY_POSITION, Mask
from tests.ops.kernels.dense_attention import dense_attention

# Interpreted kernels take long.
pytestmark = pytest.mark.slow

SINKS = jnp.array([0.5, -1.0, 3.0, 0.0, 1.0, 2.0])


def _inputs(B, T, S, N=6, K=2, H=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _ring(last, S):
    """Positions in the slots of rows whose newest token has position `last`; -1: none."""
    positions = np.full((len(last), S), EMPTY_POSITION, np.int32)
    for row, newest in enumerate(last):
        held = np.arange(max(0, newest - S + 1), newest + 1)
        positions[row, held % S] = held
    return jnp.asarray(positions)


def _queries(last, T):
    """The newest T positions of each row; a row without any has -1."""
    last = np.asarray(last)[:, None]
    return jnp.asarray(np.maximum(last - np.arange(T)[::-1], -1), jnp.int32)


def _expected(query, key, value, mask, sinks=None, softcap=None):
    visible_BTS = np.asarray(mask.as_array(query.shape[1], key.shape[1]))
    options = {"scale": 0.3, "sinks": sinks, "softcap": softcap}
    dout = np.zeros(query.shape)
    return dense_attention(query, key, value, dout, visible_BTS=visible_BTS, **options)[0]


def _quantized(x_BSKH):
    scales_BSK = jnp.max(jnp.abs(x_BSKH), axis=-1) / 127
    return jnp.round(x_BSKH / scales_BSK[..., None]).astype(jnp.int8), scales_BSK


@pytest.mark.parametrize(
    "T, S, window, features",
    [
        (1, 256, 200, False),
        (2, 384, 130, True),
        (3, 40, 38, False),
        (1, 384, None, True),
        (2, 384, 1, False),
    ],
)
def test_ring(T, S, window, features):
    # Far around the ring, just around, half full, a single token, an empty row.
    last = [1000, S + 3, 100, 0, -1]
    query, key, value = _inputs(len(last), T, S)
    query_positions, key_positions = _queries(last, T), _ring(last, S)
    segments, options = {}, {}
    if features:
        key_segments = jnp.where(key_positions > 90, 2, 1) * (key_positions != EMPTY_POSITION)
        query_segments = jnp.where(query_positions > 90, 2, 1) * (query_positions >= 0)
        segments = {"query_segments_BT": query_segments, "key_segments_BS": key_segments}
        options = {"sinks_N": SINKS, "logit_softcap": 2.0}
    mask = Mask(query_positions, key_positions, window=window, **segments)
    expected = _expected(query, key, value, mask, *options.values())
    decode = functools.partial(
        ring_decode, window=window, scale=0.3, interpret=True, **options, **segments
    )
    out = jax.jit(decode)(
        query, key, value, query_positions_BT=query_positions, key_positions_BS=key_positions
    )
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)
    assert (np.asarray(out)[-1] == 0).all()


@pytest.mark.parametrize(
    "S, window, segments, int8",
    [(256, 200, True, False), (384, None, False, True), (40, None, True, True)],
)
def test_a_unit_of_a_stack_has_the_bits_of_its_slice(S, window, segments, int8):
    units, T, last = 3, 2, [S - 6, 100 if window else 30]
    B = len(last)
    query, *cache = _inputs(units * B, T, S)
    cache = [x.reshape(units, B, *x.shape[1:]) for x in cache]
    named = {}
    if int8:
        cache, scales = zip(*map(_quantized, cache), strict=True)
        named = dict(zip(("key_scales_BSK", "value_scales_BSK"), scales, strict=True))
    slots = {"query_positions_BT": _queries(last, T), "key_positions_BS": _ring(last, S)}
    if segments:
        slots["query_segments_BT"] = jnp.full((B, T), 2)
        slots["key_segments_BS"] = jnp.where(slots["key_positions_BS"] > 20, 2, 1)
    decode = jax.jit(functools.partial(ring_decode, window=window, scale=0.3, interpret=True))
    stack = functools.partial(decode, query[:B], *cache, **named, **slots)
    seen = []
    for unit in range(units):
        alone = [x[unit] for x in cache], {name: x[unit] for name, x in named.items()}
        expected = decode(query[:B], *alone[0], **alone[1], **slots)
        seen.append(np.asarray(stack(unit=jnp.int32(unit))))
        np.testing.assert_array_equal(seen[-1], expected)
    assert not (seen[0] == seen[1]).any()


def _pages(key, value, page):
    """The rows' keys and values in pages of a shuffled pool, and which page is where."""
    B, S = key.shape[:2]
    order = np.random.default_rng(1).permutation(B * S // page)
    pages = np.argsort(order).reshape(B, -1).astype(np.int32)
    pools = [x.reshape(-1, page, *x.shape[2:])[order] for x in (key, value)]
    return pools, jnp.asarray(pages)


@pytest.mark.parametrize("window", [None, 20, 33])
@pytest.mark.parametrize("int8", [False, True])
def test_pages(window, int8):
    B, T, S, page = 3, 2, 64, 16
    last = [61, 16, 3]
    query, key, value = _inputs(B, T, S)
    positions = _queries(last, T)
    mask = Mask(positions, jnp.tile(jnp.arange(S), (B, 1)), window=window)
    scales = {}
    pools, pages = _pages(key, value, page)
    if int8:
        pools, (key_scales, value_scales) = zip(*map(_quantized, pools), strict=True)
        scales = {"key_scales": key_scales, "value_scales": value_scales}
        key, value = (
            (pool * scale[..., None])[pages].reshape(key.shape)
            for pool, scale in zip(pools, scales.values(), strict=True)
        )
    # Pages that nobody sees are never read: a number that is none would spread.
    seen = np.zeros(B * S // page, bool)
    for row, newest in enumerate(last):
        first = 0 if window is None else max(0, newest - T + 2 - window)
        seen[np.asarray(pages)[row, first // page : newest // page + 1]] = True
    if not int8:
        pools = [pool.at[~seen].set(jnp.nan) for pool in pools]
    expected = _expected(query, key, value, mask, SINKS)
    decode = functools.partial(paged_decode, window=window, scale=0.3, interpret=True)
    out = jax.jit(decode)(
        query, *pools, query_positions_BT=positions, pages_BJ=pages, sinks_N=SINKS, **scales
    )
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)


def test_simulated_memories():
    """Copies that are read before they arrived would show only here."""
    query, key, value = _inputs(2, 1, 64)
    positions = _queries([61, -1], 1)
    pools, pages = _pages(key, value, 16)
    out = paged_decode(
        query,
        *pools,
        query_positions_BT=positions,
        pages_BJ=pages,
        window=40,
        scale=0.3,
        interpret=pltpu.InterpretParams(uninitialized_memory="nan"),
    )
    mask = Mask(positions, jnp.tile(jnp.arange(64), (2, 1)), window=40)
    expected = _expected(query, key, value, mask)
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)


def test_bfloat16_ring_and_repeated_bits():
    query, key, value = _inputs(2, 1, 128, N=8, K=8, dtype=jnp.bfloat16)
    positions, slots = _queries([300, 5], 1), _ring([300, 5], 128)
    decode = functools.partial(ring_decode, window=100, scale=0.3, interpret=True)
    first, second = (
        jax.jit(decode)(query, key, value, query_positions_BT=positions, key_positions_BS=slots)
        for _ in range(2)
    )
    assert first.dtype == jnp.bfloat16
    np.testing.assert_array_equal(first, second)
    mask = Mask(positions, slots, window=100)
    expected = _expected(query, key, value, mask)
    np.testing.assert_allclose(first.astype(jnp.float32), expected, 2e-2, 2e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": 0.0}, "scale=0.0"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0"),
        ({"key_scales_BSK": jnp.ones((1, 64, 2))}, "key cache of float32 with scales: int8"),
        ({"unit": jnp.int32(0)}, r"\(1, 64, 2, 16\) with a unit: must be UBSKH"),
    ],
)
def test_bad_options_are_named(change, message):
    query, key, value = _inputs(1, 1, 64)
    options = {"window": None, "scale": 1.0, "interpret": True} | change
    with pytest.raises(ValueError, match=message):
        ring_decode(
            query,
            key,
            value,
            query_positions_BT=_queries([3], 1),
            key_positions_BS=_ring([3], 64),
            **options,
        )


def test_too_much_for_a_step_is_named():
    query, key, value = _inputs(1, 200, 64)
    positions = {"query_positions_BT": _queries([300], 200), "key_positions_BS": _ring([300], 64)}
    options = {"window": None, "scale": 1.0, "interpret": True}
    with pytest.raises(ValueError, match="200 queries of 6 heads"):
        ring_decode(query, key, value, **positions, **options)
    assert not fits(query, key) and fits(query[:, :170], key)
    one = jax.ShapeDtypeStruct((1, 1, 64, 128), jnp.float32)
    big = jax.ShapeDtypeStruct((1, 9001, 64, 128), jnp.float32)
    call = functools.partial(ring_decode, **options)
    with pytest.raises(ValueError, match="pages of 9001 tokens"):
        jax.eval_shape(
            lambda query, key, positions, slots: call(
                query, key, key, query_positions_BT=positions, key_positions_BS=slots
            ),
            one,
            big,
            jax.ShapeDtypeStruct((1, 1), jnp.int32),
            jax.ShapeDtypeStruct((1, 9001), jnp.int32),
        )
    assert not fits(one, big)


def test_pages_shrink_for_many_rows_of_many_heads():
    cache = jax.ShapeDtypeStruct((4, 1, 1024, 32, 128), jnp.bfloat16)
    few, many = (jax.ShapeDtypeStruct((1, T, 32, 128), jnp.bfloat16) for T in (1, 32))
    assert fits(few, cache) and fits(many, cache)
    # 1,023 slots are one page, of which 1,024 rows have too many scores.
    odd = jax.ShapeDtypeStruct((4, 1, 1023, 32, 128), jnp.bfloat16)
    assert not fits(many, odd)
