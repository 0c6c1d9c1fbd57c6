"""The TPU kernels, interpreted, against the dense softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from lightning_jax.ops.kernels.tpu.attention import sliding_window_attention
from lightning_jax.ops.kernels.tpu.band import BlockSizes
from lightning_jax.ops.kernels.tpu.blocks import Blocks, blocks_for
from tests.ops.kernels import dense_attention
from tests.ops.kernels.dense_attention import last_queries, packed_rows, random_inputs

# Interpreted kernels take long.
pytestmark = pytest.mark.slow


def _blocks(tiles=2, stack=1, visit=2, tile=16):
    return Blocks(*[BlockSizes(tile, tiles, stack, visit)] * 2)


def _inputs(T, N, K, dtype=jnp.float32, B=1, H=64):
    return random_inputs(T, N, K, H, dtype, B)


def _attend(blocks=None, interpret=True):
    return functools.partial(
        sliding_window_attention, blocks=blocks or _blocks(), interpret=interpret
    )


def _options(inputs, window, segments=None, sinks=None, cap=None):
    scale = inputs[0].shape[-1] ** -0.5
    return dict(window=window, segments=segments, sinks=sinks, scale=scale, logit_softcap=cap)


def _run(inputs, *options, **compiled):
    return dense_attention.run(_attend(**compiled), *inputs, **_options(inputs, *options))


def _exact(inputs, *options):
    return dense_attention.exact(inputs, **_options(inputs, *options))


def _check(inputs, window, segments=None, sinks=None, cap=None, blocks=None, tolerance=2e-5):
    options = _options(inputs, window, segments, sinks, cap)
    return dense_attention.check(_attend(blocks), inputs, tolerance, **options)


@pytest.mark.parametrize(
    "T, window, N, K, blocks",
    [
        (70, 1, 2, 2, _blocks()),
        (100, 17, 2, 1, _blocks(tiles=2)),
        (100, 32, 2, 2, _blocks(tiles=2)),
        (130, 48, 4, 1, _blocks(tiles=1, stack=4, visit=1)),
        (50, None, 8, 1, _blocks(tiles=1, stack=8)),
        (9, 4, 2, 1, _blocks(tiles=1)),
        (100, 15, 2, 1, _blocks(tiles=1)),
        (100, 16, 4, 1, _blocks(tiles=2, stack=2)),
        (70, 33, 4, 2, _blocks(tiles=4, stack=2)),
        (130, 64, 1, 1, _blocks(tiles=2, visit=1)),
        (130, 95, 4, 2, _blocks(tiles=1, stack=2)),
        (50, 1000, 4, 2, _blocks(tiles=2, stack=2)),
    ],
)
def test_windows_lengths_and_head_groups(T, window, N, K, blocks):
    _check(_inputs(T, N, K), window, blocks=blocks)


@pytest.mark.parametrize("H", [24, 128, 256])
def test_head_sizes(H):
    _check(_inputs(70, 2, 1, H=H), 32, blocks=_blocks(tiles=1))


@pytest.mark.parametrize(
    "window, with_sinks, cap", [(32, True, 2.0), (20, False, None), (None, True, None)]
)
def test_packed_rows_padding_sinks_and_softcap(window, with_sinks, cap):
    inputs, segments = _inputs(70, 4, 2, B=2), packed_rows(70)
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0]) if with_sinks else None
    out, (dquery, dkey, dvalue, *_) = _check(inputs, window, segments, sinks, cap)
    for array in (out, dquery, dkey, dvalue):
        assert (np.asarray(array)[segments == 0] == 0).all()


@pytest.mark.parametrize(
    "window, offset, packed, blocks",
    [
        # Folded from the first query on; behind padding, and without whole windows at first.
        (32, 31, False, _blocks(tiles=1)),
        (20, 37, True, _blocks(tiles=1, stack=2)),
        (None, 37, True, _blocks(tiles=2)),
        (1, 69, False, _blocks(tiles=1)),
        (32, 1, True, _blocks(tiles=2)),
        (32, 32, True, _blocks(tiles=2)),
        (32, 33, False, _blocks(tiles=1, visit=1)),
        (20, 19, True, _blocks(tiles=2, stack=2)),
        (20, 20, False, _blocks(tiles=1)),
        (20, 21, True, _blocks(tiles=2)),
        (20, 69, True, _blocks(tiles=1)),
        (None, 1, False, _blocks(tiles=2)),
        (None, 64, True, _blocks(tiles=1, stack=2)),
        (None, 69, True, _blocks(tiles=2)),
        (1, 1, True, _blocks(tiles=1)),
        (1, 2, False, _blocks(tiles=2)),
    ],
)
def test_queries_are_the_last_of_the_keys(window, offset, packed, blocks):
    inputs, segments = _inputs(70, 4, 2, B=2), packed_rows(70) if packed else None
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0])
    _check(last_queries(inputs, offset), window, segments, sinks, None, blocks)


@pytest.mark.parametrize(
    "window, offset, steps",
    [(1, 4096, 1), (32, 4096, 3), (32, 31, 3), (32, 20, 3), (32, 16, 2), (None, 64, 5)],
)
def test_grid_steps_follow_the_keys_in_sight(window, offset, steps):
    """A block of 16 queries, and the blocks of 16 before it that its windows reach."""
    shapes = [
        jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        for length in (16, offset + 16, offset + 16)
    ]
    attend = functools.partial(
        sliding_window_attention,
        window=window,
        scale=1.0,
        query_offset=offset,
        blocks=_blocks(tiles=1),
    )
    assert f"grid=(1, 1, {steps}, 1)" in str(jax.make_jaxpr(attend)(*shapes))


@pytest.mark.parametrize("window", [32, None])
def test_bfloat16_with_all_features(window):
    inputs = _inputs(70, 4, 1, jnp.bfloat16, B=2, H=128)
    _check(inputs, window, packed_rows(70), jnp.zeros(4), 20.0, _blocks(stack=2), tolerance=4e-2)


def test_large_scores_do_not_overflow():
    query, key, value, dout = _inputs(70, 2, 1)
    # Hidden keys with scores near 1e6 must not reach the visible ones through the maximum.
    key = key.at[:, 30:].multiply(1e6)
    inputs = [query, key, value, dout]
    (out, gradients), (expected, exact) = _run(inputs, 32), _exact(inputs, 32)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_allclose(out[:, :30], expected[:, :30], 1e-5, 1e-5)
    np.testing.assert_allclose(gradients[0][:, :30], exact[0][:, :30], 1e-4, 1e-4)


@pytest.mark.parametrize("window", [32, 20])
def test_gradients_reach_visible_keys_only(window):
    segments = np.repeat([[1, 2]], [30, 70], axis=1).astype(np.int32)
    query, key, value, _ = _inputs(100, 2, 1)
    times = np.array([10, 29, 30, 47, 99])
    one_hot = jnp.zeros((5, 1, 100, 2, 64)).at[np.arange(5), :, times].set(1.0)
    # vmap, too: the kernel's grid gets one more axis.
    _, gradients = jax.vmap(lambda dout: _run([query, key, value, dout], window, segments))(one_hot)
    touched_query, touched_key, touched_value = (np.any(x, (1, 3, 4)) for x in gradients)
    first = np.maximum(times - window + 1, np.where(times < 30, 0, 30))
    reachable = (np.arange(100) >= first[:, None]) & (np.arange(100) <= times[:, None])
    np.testing.assert_array_equal(touched_value, reachable)
    # A query with one visible key has a constant softmax: no gradient for its key.
    several = reachable.sum(1) > 1
    np.testing.assert_array_equal(touched_key[several], reachable[several])
    np.testing.assert_array_equal(touched_query[several], times[several, None] == np.arange(100))


@pytest.mark.parametrize(
    "window, offset", [(32, 0), (17, 0), (None, 0), (32, 40), (17, 37), (None, 37)]
)
def test_simulated_memories(window, offset):
    """Blocks that are written back too early, or memory that nobody wrote, show only here."""
    inputs, segments = last_queries(_inputs(70, 4, 1), offset), packed_rows(70)[:1]
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0])
    out, gradients = _run(
        inputs,
        window,
        segments,
        sinks,
        blocks=_blocks(tiles=1, stack=2),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan"),
    )
    expected, exact = _exact(inputs, window, segments, sinks)
    for left, right in zip((out, *gradients), (expected, *exact), strict=True):
        np.testing.assert_allclose(left, right, 3e-5, 3e-5)


def test_same_inputs_same_bits():
    inputs = _inputs(70, 4, 1)
    first, second = (jax.tree.leaves(_run(inputs, 32)) for _ in range(2))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, second, strict=True))


def test_vmap_and_shard_map_over_the_batch():
    query, key, value, _ = _inputs(40, 2, 1, B=4)
    attend = functools.partial(
        sliding_window_attention, window=20, scale=0.3, interpret=True, blocks=_blocks()
    )
    whole = jax.jit(attend)(query, key, value)
    split = [x.reshape(2, 2, *x.shape[1:]) for x in (query, key, value)]
    mapped = jax.jit(jax.vmap(attend))(*split).reshape(whole.shape)
    np.testing.assert_array_equal(mapped, whole)
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    rows = PartitionSpec("x")
    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=False
    )
    np.testing.assert_array_equal(jax.jit(sharded)(query, key, value), whole)


@pytest.mark.parametrize("length, window, group", [(1, None, 1), (100, 7, 4), (4096, 512, 3)])
def test_table_fits_length_window_and_heads(length, window, group):
    for kind in ("TPU v5 lite", "TPU v6 lite", "TPU v5", "no such device"):
        blocks = blocks_for(kind, 128, group, length, window, 2)
        for sizes in (blocks.forward, blocks.backward):
            assert group % sizes.stack == 0
            assert sizes.tile >= 128 and sizes.block <= max(128, 2 * length)
            assert window is None or window < 128 or window % sizes.tile == 0


def test_blocks_shrink_where_they_would_start_long_before_the_queries():
    forward = {
        offset: blocks_for("TPU v6 lite", 128, 1, 1024, 1024, 2, offset).forward
        for offset in (0, 1000, 1024, 1023)
    }
    assert forward[0].block == forward[1023].block == forward[1024].block == 1024
    assert forward[1000].block == 128


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"logit_softcap": -1.0}, "logit_softcap=-1.0"),
        ({"query_offset": -1}, "query_offset=-1"),
    ],
)
def test_bad_options_are_named(change, message):
    query, key, value, _ = _inputs(9, 2, 1)
    options = {"window": None, "scale": 1.0, "interpret": True} | change
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(query, key, value, **options)


def test_bad_arrays_are_named():
    query, key, value, _ = _inputs(9, 2, 1)
    attend = functools.partial(sliding_window_attention, window=None, scale=1.0, interpret=True)
    with pytest.raises(ValueError, match="float16"):
        attend(*(x.astype(jnp.float16) for x in (query, key, value)))
    with pytest.raises(ValueError, match="9 queries for 5 keys"):
        attend(query, key[:, :5], value[:, :5])


def test_too_many_keys_in_sight_are_named():
    shape = jax.ShapeDtypeStruct((1, 2**21, 1, 128), jnp.bfloat16)
    attend = functools.partial(sliding_window_attention, window=None, scale=1.0)
    with pytest.raises(ValueError, match="block of queries sees 2097152 keys"):
        jax.eval_shape(attend, shape, shape, shape)


def test_bad_block_size_is_named():
    with pytest.raises(ValueError, match="tiles=3"):
        BlockSizes(16, 3, 1, 1)
