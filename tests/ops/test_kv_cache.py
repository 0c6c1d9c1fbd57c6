import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops import kv_cache
from lightning_jax.ops.kv_cache import KV, Slots
from lightning_jax.ops.mask import EMPTY_POSITION


def _chunk(start, length, padded=None, segment=1):
    """Positions and segments of one row: `length` tokens from `start`, then padding."""
    position_BT = start + np.arange(padded or length)[None]
    segment_BT = np.where(np.arange(padded or length)[None] < length, segment, 0)
    return jnp.asarray(position_BT, jnp.int32), jnp.asarray(segment_BT, jnp.int32)


@jax.jit
def _write(slots, position_BT, segment_BT):
    slot_BT = kv_cache.slot_index(position_BT, segment_BT, slots.position_BS.shape[1])
    return kv_cache.write(slots, Slots(position_BT, segment_BT), slot_BT)


def test_empty_slots_hold_nothing():
    slots, kv = kv_cache.init_slots(2, 3), kv_cache.init_kv(2, 3, 4, 5, jnp.bfloat16)
    np.testing.assert_array_equal(slots.position_BS, np.full((2, 3), EMPTY_POSITION))
    np.testing.assert_array_equal(slots.segment_BS, np.zeros((2, 3)))
    assert kv.key_BSKH.shape == kv.value_BSKH.shape == (2, 3, 4, 5)
    assert kv.key_BSKH.dtype == jnp.bfloat16


def test_tokens_go_in_order_and_wrap():
    slots = kv_cache.init_slots(1, 4)
    slots = _write(slots, *_chunk(0, 3))
    np.testing.assert_array_equal(slots.position_BS, [[0, 1, 2, EMPTY_POSITION]])
    slots = _write(slots, *_chunk(3, 3, segment=2))
    np.testing.assert_array_equal(slots.position_BS, [[4, 5, 2, 3]])
    np.testing.assert_array_equal(slots.segment_BS, [[2, 2, 1, 2]])


@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("length", [4, 5, 13])
def test_a_chunk_longer_than_the_ring_leaves_its_last_tokens(start, length):
    slots = _write(kv_cache.init_slots(1, 4), *_chunk(start, length))
    last = np.arange(start + length - 4, start + length)
    np.testing.assert_array_equal(np.sort(slots.position_BS[0]), last)
    np.testing.assert_array_equal(slots.position_BS[0] % 4, np.arange(4))


def test_padding_is_dropped_and_does_not_push_tokens_out():
    position_BT, segment_BT = _chunk(2, 3, padded=12)
    slot_BT = kv_cache.slot_index(position_BT, segment_BT, 4)
    np.testing.assert_array_equal(slot_BT[0], [2, 3, 0] + [4] * 9)
    slots = _write(kv_cache.init_slots(1, 4), position_BT, segment_BT)
    np.testing.assert_array_equal(slots.position_BS, [[4, EMPTY_POSITION, 2, 3]])


def test_a_chunk_of_padding_changes_nothing():
    before = _write(kv_cache.init_slots(1, 4), *_chunk(0, 6))
    after = _write(before, *_chunk(6, 0, padded=5))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_no_slot_is_written_twice(size):
    rng = np.random.default_rng(size)
    position_BT = jnp.asarray(rng.integers(0, 50, (64, 1)) + np.arange(10)[None], jnp.int32)
    segment_BT = jnp.asarray(rng.integers(0, 3, (64, 10)), jnp.int32)
    slot_BT = np.asarray(kv_cache.slot_index(position_BT, segment_BT, size))
    for slot_T, segment_T in zip(slot_BT, np.asarray(segment_BT), strict=True):
        written = slot_T[slot_T < size]
        assert len(set(written)) == len(written)
        assert (slot_T[segment_T == 0] == size).all()
        assert ((slot_T >= 0) & (slot_T <= size)).all()


def test_rows_have_their_own_positions():
    position_BT = jnp.asarray([[0, 1], [5, 6], [9, 10]], jnp.int32)
    segment_BT = jnp.asarray([[1, 1], [1, 0], [0, 0]], jnp.int32)
    slots = _write(kv_cache.init_slots(3, 4), position_BT, segment_BT)
    empty = EMPTY_POSITION
    expected = [[0, 1, empty, empty], [empty, 5, empty, empty], [empty] * 4]
    np.testing.assert_array_equal(slots.position_BS, expected)


def test_keys_and_values_go_where_their_positions_go():
    kv, slots = kv_cache.init_kv(1, 4, 2, 3, jnp.float32), kv_cache.init_slots(1, 4)
    write_kv = jax.jit(kv_cache.write)
    for start, length in ((0, 3), (3, 6), (9, 1), (10, 2)):
        position_BT, segment_BT = _chunk(start, length, padded=6)
        key = np.broadcast_to(position_BT[:, :, None, None], (1, 6, 2, 3)).astype(np.float32)
        slot_BT = kv_cache.slot_index(position_BT, segment_BT, 4)
        kv = write_kv(kv, KV(key, -key), slot_BT)
        slots = _write(slots, position_BT, segment_BT)
        filled = np.asarray(slots.segment_BS[0] != 0)
        np.testing.assert_array_equal(
            kv.key_BSKH[0, filled, 1, 2], slots.position_BS[0, filled].astype(jnp.float32)
        )
    np.testing.assert_array_equal(kv.value_BSKH, -kv.key_BSKH)
    np.testing.assert_array_equal(slots.position_BS, [[8, 9, 10, 11]])


def test_append_keeps_both_and_casts():
    old, new = kv_cache.init_kv(1, 3, 2, 4, jnp.bfloat16), kv_cache.init_kv(1, 2, 2, 4, jnp.float32)
    both = kv_cache.append(old, jax.tree.map(lambda a: a + 1, new))
    assert both.key_BSKH.shape == (1, 5, 2, 4) and both.key_BSKH.dtype == jnp.bfloat16
    np.testing.assert_array_equal(both.key_BSKH[0, :, 0, 0], [0, 0, 0, 1, 1])
