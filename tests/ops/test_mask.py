import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.mask import EMPTY_POSITION, Mask


def _visible(mask, q, k, query_segment=1, key_segment=1):
    return (
        query_segment == key_segment != 0
        and (q >= k or not mask.causal)
        and (mask.window is None or q - k < mask.window)
    )


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_aligned(window, causal):
    mask = Mask(window=window, causal=causal)
    assert mask.aligned
    expected = [[_visible(mask, q, k) for k in range(7)] for q in range(7)]
    np.testing.assert_array_equal(mask.as_array(7, 7)[0], expected)
    with pytest.raises(ValueError, match="3 queries need as many keys, not 7"):
        mask.as_array(3, 7)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offset", [1, 2, 6])
def test_queries_at_an_offset_are_the_last_rows(window, causal, offset):
    segments = jnp.array([[1, 1, 2, 2, 0, 2, 2], [0, 0, 0, 1, 1, 1, 1]])
    whole = Mask(None, None, segments, segments, window=window, causal=causal)
    last = Mask(None, None, segments[:, offset:], segments, window, causal, query_offset=offset)
    assert last.aligned
    found = last.as_array(7 - offset, 7)
    np.testing.assert_array_equal(found, whole.as_array(7, 7)[:, offset:])
    with pytest.raises(ValueError, match=f"7 queries need {7 + offset} keys at query_offset"):
        last.as_array(7, 7)


def test_bad_offsets():
    with pytest.raises(ValueError, match="query_offset=-1: must not be negative"):
        Mask(query_offset=-1)
    positions = jnp.arange(3)[None]
    with pytest.raises(ValueError, match="query_offset=2 with positions"):
        Mask(positions, positions, query_offset=2)


def test_window_counts_self():
    np.testing.assert_array_equal(Mask(window=2).as_array(5, 5).sum(-1), [[1, 2, 2, 2, 2]])


def test_positions_and_segments():
    positions = jnp.array([[5, 6], [2, 3]]), jnp.array([[4, 5, 6], [EMPTY_POSITION, 2, 3]])
    segments = jnp.array([[1, 2], [1, 0]]), jnp.array([[1, 1, 2], [0, 1, 0]])
    mask = Mask(*positions, *segments, window=2)
    assert not mask.aligned
    expected = [
        [
            [
                _visible(mask, positions[0][b, t], positions[1][b, s], segments[0][b, t], segment)
                for s, segment in enumerate(segments[1][b])
            ]
            for t in range(2)
        ]
        for b in range(2)
    ]
    np.testing.assert_array_equal(mask.as_array(2, 3), expected)


def test_empty_slots_are_hidden_without_segments():
    mask = Mask(jnp.array([[4]]), jnp.array([[4, EMPTY_POSITION]]))
    np.testing.assert_array_equal(mask.as_array(1, 2), [[[True, False]]])


def test_padding_sees_nothing_and_is_seen_by_nobody():
    segments = jnp.array([[1, 0, 1, 0]])
    visible = Mask(None, None, segments, segments).as_array(4, 4)[0]
    assert not visible[1].any() and not visible[:, 3].any() and visible[2, 0]


def test_is_a_pytree_with_static_window():
    positions = jnp.arange(3)[None]
    mask = Mask(positions, positions, window=2)
    assert len(jax.tree.leaves(mask)) == 2
    assert jax.tree.map(lambda leaf: None, mask).window == 2
    assert jax.tree.map(lambda leaf: None, Mask(query_offset=2)).query_offset == 2
    assert jax.tree.map(lambda leaf: "spec", mask).query_positions_BT == "spec"
    structure = jax.tree.structure(mask)
    assert jax.tree.unflatten(structure, [None, object()]).causal
    np.testing.assert_array_equal(
        jax.jit(lambda mask: mask.as_array(3, 3))(mask), Mask(window=2).as_array(3, 3)
    )
    batched = jax.vmap(lambda mask: mask.as_array(3, 3))(jax.tree.map(lambda x: x[None], mask))
    assert batched.shape == (1, 1, 3, 3)


@pytest.mark.parametrize("window", [0, -1])
def test_bad_window(window):
    with pytest.raises(ValueError, match=f"window={window}"):
        Mask(window=window)


@pytest.mark.parametrize("given, missing", [(0, "key_positions_BS"), (3, "query_segments_BT")])
def test_one_sided_fields(given, missing):
    fields = [None] * 4
    fields[given] = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match=f"{missing}=None"):
        Mask(*fields)
