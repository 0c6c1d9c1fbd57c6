import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops import kv_cache
from lightning_jax.ops.kv_cache import KV, Chunk, Fresh, Full, Ring, Stored

HEADS, SIZE_H, UNITS, UNIT = 2, 3, 3, 1


def chunk_of(start, length, before, padded=None, segment=1):
    """A chunk of one row: `length` tokens from `start`, then padding."""
    segment_BT = np.where(np.arange(padded or length)[None] < length, segment, 0)
    return Chunk.append(jnp.array([start], jnp.int32), jnp.asarray(segment_BT, jnp.int32), before)


def empty(size, rows=1):
    return jnp.zeros((rows, size), jnp.int32)


def positions(chunk):
    """The position in each slot after the chunk, -1 where there is none."""
    slot_S = jnp.arange(chunk.after_BS.shape[1], dtype=jnp.int32)
    found_BS = kv_cache.slot_positions(chunk.last_B, slot_S, len(slot_S))
    return np.where((found_BS >= 0) & (chunk.after_BS != 0), found_BS, -1)


def test_tokens_go_in_order_and_wrap():
    first = chunk_of(0, 3, empty(4))
    np.testing.assert_array_equal(positions(first), [[0, 1, 2, -1]])
    second = chunk_of(3, 3, first.after_BS, segment=2)
    np.testing.assert_array_equal(positions(second), [[4, 5, 2, 3]])
    np.testing.assert_array_equal(second.after_BS, [[2, 2, 1, 2]])


@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("length", [4, 5, 13])
def test_a_chunk_longer_than_the_ring_leaves_its_last_tokens(start, length):
    held = positions(chunk_of(start, length, empty(4)))
    np.testing.assert_array_equal(np.sort(held[0]), np.arange(start + length - 4, start + length))
    np.testing.assert_array_equal(held[0] % 4, np.arange(4))


def test_padding_is_dropped_and_does_not_push_tokens_out():
    chunk = chunk_of(2, 3, empty(4), padded=12)
    np.testing.assert_array_equal(positions(chunk), [[4, -1, 2, 3]])


def test_a_chunk_of_padding_changes_nothing():
    before = chunk_of(0, 6, empty(4))
    after = chunk_of(6, 0, before.after_BS, padded=5)
    np.testing.assert_array_equal(before.after_BS, after.after_BS)
    np.testing.assert_array_equal(before.last_B, after.last_B)


def test_rows_have_their_own_positions():
    segment_BT = jnp.asarray([[1, 1], [1, 0], [0, 0]], jnp.int32)
    chunk = Chunk.append(jnp.array([0, 5, 9], jnp.int32), segment_BT, empty(4, rows=3))
    expected = [[0, 1, -1, -1], [-1, 5, -1, -1], [-1] * 4]
    np.testing.assert_array_equal(positions(chunk), expected)


def keys_of(chunk):
    """Keys that spell their position in every entry, NaN in padding; values are their negatives."""
    position_BT = np.where(chunk.segment_BT != 0, chunk.position_BT, np.nan)
    key = np.broadcast_to(position_BT[:, :, None, None], (*position_BT.shape, HEADS, SIZE_H))
    return KV(jnp.asarray(key, jnp.float32), jnp.asarray(-key, jnp.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "size"), [(Ring, 4), (Full, 12)])
def test_keys_and_values_go_where_their_positions_go(kind, size, dtype):
    cache, before_BS = kind.init(UNITS, 1, size, HEADS, SIZE_H, dtype), empty(size)
    update = jax.jit(lambda cache, kv, chunk: cache.update(kv, jnp.int32(UNIT), chunk, 4)[0])
    for start, length in ((0, 3), (3, 6), (9, 1), (10, 2)):
        for width in (6, 1) if length == 1 else (6,):
            chunk = chunk_of(start, length, before_BS, padded=width)
            cache = update(cache, keys_of(chunk), chunk)
        before_BS, held_BS = chunk.after_BS, positions(chunk)
        kv = cache.read(UNIT)
        assert kv.key_BSKH.dtype == dtype
        filled = held_BS[0] >= 0
        expected = np.broadcast_to(held_BS[0, filled, None, None], (filled.sum(), HEADS, SIZE_H))
        np.testing.assert_array_equal(np.asarray(kv.key_BSKH[0, filled], np.float32), expected)
        np.testing.assert_array_equal(np.asarray(kv.value_BSKH[0, filled], np.float32), -expected)
    assert filled.all()
    for other in set(range(UNITS)) - {UNIT}:
        assert not np.asarray(cache.read(other).key_BSKH, np.float32).any()


def test_a_ring_shows_long_chunks_what_they_overwrite():
    cache = Ring.init(UNITS, 1, 4, HEADS, SIZE_H, "float32")
    first = chunk_of(0, 6, empty(4))
    cache, _ = cache.update(keys_of(first), jnp.int32(UNIT), first, 4)
    second = chunk_of(6, 3, first.after_BS, segment=2)
    _, view = cache.update(keys_of(second), jnp.int32(UNIT), second, 4)
    assert isinstance(view, Fresh)
    np.testing.assert_array_equal(view.kv.key_BSKH[0, :, 0, 0], np.arange(2, 9))
    np.testing.assert_array_equal(view.mask.key_segments_BS, [[1, 1, 1, 1, 2, 2, 2]])
    assert (view.mask.query_offset, view.mask.window) == (4, 4)


@pytest.mark.parametrize(("kind", "width"), [(Ring, 1), (Full, 1), (Full, 3)])
def test_else_the_view_is_the_written_cache(kind, width):
    cache = kind.init(UNITS, 1, 4, HEADS, SIZE_H, "float32")
    chunk = chunk_of(0, width, empty(4))
    cache, view = cache.update(keys_of(chunk), jnp.int32(UNIT), chunk, 4)
    assert isinstance(view, Stored) and view.cache is cache and view.window == 4


def test_padding_may_reach_beyond_a_full_cache():
    cache = Full.init(1, 1, 4, HEADS, SIZE_H, "float32")
    chunk = chunk_of(2, 2, empty(4), padded=6)
    cache, _ = cache.update(keys_of(chunk), jnp.int32(0), chunk, None)
    np.testing.assert_array_equal(cache.read(0).key_BSKH[0, :, 0, 0], [0, 0, 2, 3])


@pytest.mark.parametrize("kind", [Ring, Full])
@pytest.mark.parametrize("width", [1, 8])
def test_a_scan_writes_in_place(kind, width):
    """The compiled loop over units holds no copy of the caches."""
    units, size = 4, 2048
    cache = jax.eval_shape(lambda: kind.init(units, 1, size, HEADS, 64, "bfloat16"))

    def step(cache, kv, chunk):
        body = lambda cache, unit: (cache.update(kv, unit, chunk, size)[0], None)  # noqa: E731
        return jax.lax.scan(body, cache, jnp.arange(units, dtype=jnp.int32))[0]

    kv = jax.eval_shape(lambda: KV(*(jnp.zeros((1, width, HEADS, 64), "bfloat16"),) * 2))
    chunk = jax.eval_shape(lambda: chunk_of(0, width, empty(size)))
    compiled = jax.jit(step, donate_argnums=0).lower(cache, kv, chunk).compile()
    one_unit = size * HEADS * 64 * 2
    # A long chunk orders the ring of one unit, keys and values.
    allowed = 8 * one_unit if (kind, width) == (Ring, 8) else one_unit / 2
    assert compiled.memory_analysis().temp_size_in_bytes < allowed
