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
from tests.ops.kernels.dense_attention import dense_attention, window_mask

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def _blocks(tiles=2, stack=1, visit=2, tile=16):
    return Blocks(*[BlockSizes(tile, tiles, stack, visit)] * 2)


def _dense(query, key, value, dout, window, segments=None, sinks=None, cap=None):
    visible = window_mask(query.shape[1], window, segments)
    return dense_attention(
        query,
        key,
        value,
        dout,
        visible_BTS=visible,
        scale=query.shape[-1] ** -0.5,
        sinks=sinks,
        softcap=cap,
    )


def _inputs(T, N, K, dtype=jnp.float32, B=1, H=64):
    rng = np.random.default_rng(T + N)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _packed(T):
    """Row 0: documents that start inside blocks, then padding. Row 1: nothing but padding."""
    row = np.repeat([1, 2, 3, 0], [5, T // 2, T - T // 2 - 9, 4])
    return np.stack([row, np.zeros(T, np.int64)]).astype(np.int32)


def _run(
    query,
    key,
    value,
    dout,
    window,
    segments=None,
    sinks=None,
    cap=None,
    blocks=None,
    interpret=True,
):
    @jax.jit
    def both(query, key, value, sinks, dout):
        def attend(query, key, value, sinks):
            return sliding_window_attention(
                query,
                key,
                value,
                window=window,
                query_segments_BT=segments,
                key_segments_BT=segments,
                sinks_N=sinks,
                scale=query.shape[-1] ** -0.5,
                logit_softcap=cap,
                interpret=interpret,
                blocks=blocks or _blocks(),
            )

        out, pull = jax.vjp(attend, query, key, value, sinks)
        return out, pull(dout)

    out, gradients = both(query, key, value, sinks, dout)
    return out, [gradient for gradient in gradients if gradient is not None]


def _check(inputs, window, segments=None, sinks=None, cap=None, blocks=None, tolerance=2e-5):
    expected, expected_gradients = _dense(*inputs, window, segments, sinks, cap)
    out, gradients = _run(*inputs, window, segments, sinks, cap, blocks)
    assert out.dtype == inputs[0].dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, tolerance, tolerance)
    assert len(gradients) == len(expected_gradients)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        gradient = np.asarray(gradient, np.float64)
        np.testing.assert_allclose(gradient, exact, tolerance, 4 * tolerance)
    return out, gradients


@pytest.mark.parametrize(
    "T, window, N, K, blocks",
    [
        (70, 1, 2, 2, _blocks()),
        slow(100, 17, 2, 1, _blocks(tiles=2)),
        (100, 32, 2, 2, _blocks(tiles=2)),
        (130, 48, 4, 1, _blocks(tiles=1, stack=4, visit=1)),
        (50, None, 8, 1, _blocks(tiles=1, stack=8)),
        slow(9, 4, 2, 1, _blocks(tiles=1)),
        slow(100, 15, 2, 1, _blocks(tiles=1)),
        slow(100, 16, 4, 1, _blocks(tiles=2, stack=2)),
        slow(70, 33, 4, 2, _blocks(tiles=4, stack=2)),
        slow(130, 64, 1, 1, _blocks(tiles=2, visit=1)),
        slow(130, 95, 4, 2, _blocks(tiles=1, stack=2)),
        slow(50, 1000, 4, 2, _blocks(tiles=2, stack=2)),
    ],
)
def test_windows_lengths_and_head_groups(T, window, N, K, blocks):
    _check(_inputs(T, N, K), window, blocks=blocks)


@pytest.mark.parametrize("H", [24, slow(128), slow(256)])
def test_head_sizes(H):
    _check(_inputs(70, 2, 1, H=H), 32, blocks=_blocks(tiles=1))


@pytest.mark.parametrize(
    "window, with_sinks, cap", [(32, True, 2.0), slow(20, False, None), slow(None, True, None)]
)
def test_packed_rows_padding_sinks_and_softcap(window, with_sinks, cap):
    inputs, segments = _inputs(70, 4, 2, B=2), _packed(70)
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0]) if with_sinks else None
    out, (dquery, dkey, dvalue, *_) = _check(inputs, window, segments, sinks, cap)
    for array in (out, dquery, dkey, dvalue):
        assert (np.asarray(array)[segments == 0] == 0).all()


@pytest.mark.parametrize("window", [32, slow(None)])
def test_bfloat16_with_all_features(window):
    inputs = _inputs(70, 4, 1, jnp.bfloat16, B=2, H=128)
    _check(inputs, window, _packed(70), jnp.zeros(4), 20.0, _blocks(stack=2), tolerance=4e-2)


@pytest.mark.slow
def test_large_scores_do_not_overflow():
    query, key, value, dout = _inputs(70, 2, 1)
    # Hidden keys with scores near 1e6 must not reach the visible ones through the maximum.
    key = key.at[:, 30:].multiply(1e6)
    out, gradients = _run(query, key, value, dout, 32)
    expected, exact = _dense(query, key, value, dout, 32)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_allclose(out[:, :30], expected[:, :30], 1e-5, 1e-5)
    np.testing.assert_allclose(gradients[0][:, :30], exact[0][:, :30], 1e-4, 1e-4)


@pytest.mark.parametrize("window", [32, slow(20)])
def test_gradients_reach_visible_keys_only(window):
    segments = np.repeat([[1, 2]], [30, 70], axis=1).astype(np.int32)
    query, key, value, _ = _inputs(100, 2, 1)
    times = np.array([10, 29, 30, 47, 99])
    one_hot = jnp.zeros((5, 1, 100, 2, 64)).at[np.arange(5), :, times].set(1.0)
    # vmap, too: the kernel's grid gets one more axis.
    _, gradients = jax.vmap(lambda dout: _run(query, key, value, dout, window, segments))(one_hot)
    touched_query, touched_key, touched_value = (np.any(x, (1, 3, 4)) for x in gradients)
    first = np.maximum(times - window + 1, np.where(times < 30, 0, 30))
    reachable = (np.arange(100) >= first[:, None]) & (np.arange(100) <= times[:, None])
    np.testing.assert_array_equal(touched_value, reachable)
    # A query with one visible key has a constant softmax: no gradient for its key.
    several = reachable.sum(1) > 1
    np.testing.assert_array_equal(touched_key[several], reachable[several])
    np.testing.assert_array_equal(touched_query[several], times[several, None] == np.arange(100))


@pytest.mark.slow
@pytest.mark.parametrize("window", [32, 17, None])
def test_simulated_memories(window):
    """Blocks that are written back too early, or memory that nobody wrote, show only here."""
    inputs, segments, sinks = _inputs(70, 4, 1), _packed(70)[:1], jnp.array([0.5, -1.0, 3.0, 0.0])
    out, gradients = _run(
        *inputs,
        window,
        segments,
        sinks,
        blocks=_blocks(tiles=1, stack=2),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan"),
    )
    expected, exact = _dense(*inputs, window, segments, sinks)
    for left, right in zip((out, *gradients), (expected, *exact), strict=True):
        np.testing.assert_allclose(left, right, 3e-5, 3e-5)


@pytest.mark.slow
def test_same_inputs_same_bits():
    inputs = _inputs(70, 4, 1)
    first, second = (jax.tree.leaves(_run(*inputs, 32)) for _ in range(2))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, second, strict=True))


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"logit_softcap": -1.0}, "logit_softcap=-1.0"),
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
