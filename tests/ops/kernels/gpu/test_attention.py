"""The GPU kernels of attention in interpret mode, against the dense softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from lightning_jax.ops.kernels.gpu.attention import sliding_window_attention
from lightning_jax.ops.kernels.gpu.blocks import Tile, Tiles
from tests.ops.kernels import dense_attention
from tests.ops.kernels.dense_attention import last_queries, packed_rows, random_inputs

# Interpreted kernels take long.
pytestmark = pytest.mark.slow

# Every kernel has blocks of its own, with more queries than keys and the other way round.
TILES = Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
T, SCALE = 70, 0.3


def _inputs(N, K, H=16, dtype=jnp.float32, B=1, length=T):
    return random_inputs(length, N, K, H, dtype, B)


def _attend(tiles=TILES):
    return functools.partial(sliding_window_attention, interpret=True, tiles=tiles)


_run = functools.partial(dense_attention.run, _attend(), scale=SCALE)
_exact = functools.partial(dense_attention.exact, scale=SCALE)


def _check(inputs, tolerance=1e-5, *, tiles=TILES, **options):
    return dense_attention.check(_attend(tiles), inputs, tolerance, scale=SCALE, **options)


@pytest.mark.parametrize(
    "length, window, N, K",
    [
        (T, 17, 8, 1),
        (T, None, 4, 4),
        (9, 4, 2, 1),
        (T, 1, 2, 2),
        (T, 15, 2, 1),
        (64, 16, 4, 1),
        (T, 33, 4, 1),
        (T, 1000, 8, 2),
    ],
)
def test_windows_lengths_and_head_groups(length, window, N, K):
    inputs = _inputs(N, K, length=length)
    _check(inputs, window=window, sinks=jnp.linspace(-1.0, 3.0, N))


@pytest.mark.parametrize("window, with_sinks", [(20, True), (None, True), (1, False)])
def test_packed_rows_and_padding(window, with_sinks):
    inputs, segments = _inputs(4, 2, B=2), packed_rows(T)
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0]) if with_sinks else None
    out, (dquery, dkey, dvalue, *_) = _check(inputs, window=window, segments=segments, sinks=sinks)
    for array in (out, dquery, dkey, dvalue):
        assert (np.asarray(array)[segments == 0] == 0).all()


@pytest.mark.parametrize(
    "window, offset, packed",
    [
        (20, 19, True),
        (20, 37, False),
        (None, 37, True),
        (1, 69, False),
        (20, 1, True),
        (20, 20, False),
        (20, 21, True),
        (20, 69, True),
        (None, 1, False),
        (None, 32, True),
        (None, 69, True),
        (1, 1, True),
        (1, 2, False),
    ],
)
def test_queries_are_the_last_of_the_keys(window, offset, packed):
    inputs, segments = _inputs(4, 2, B=2), packed_rows(T) if packed else None
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0])
    _check(last_queries(inputs, offset), window=window, segments=segments, sinks=sinks)


def test_documents_in_any_order_and_one_row_of_segments_for_all():
    inputs = _inputs(4, 2, B=2)
    segments = np.repeat([[7, 2, 7, 0, 9, 2]], [11, 20, 9, 3, 10, 17], axis=1).astype(np.int32)
    _check(inputs, window=50, segments=segments)


@pytest.mark.parametrize("logit_softcap, window", [(2.0, 20), (30.0, None)])
def test_soft_cap(logit_softcap, window):
    query, *others = _inputs(4, 2)
    _check([4 * query, *others], window=window, logit_softcap=logit_softcap)


@pytest.mark.parametrize("H", [64, 128, 256])
def test_head_sizes_and_the_tiles_of_the_table(H):
    _check(_inputs(2, 1, H=H, length=150), 2e-5, window=70, tiles=None)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    inputs, segments = _inputs(8, 2, dtype=dtype, B=2), packed_rows(T)
    _, gradients = _check(inputs, 4e-2, window=20, segments=segments, sinks=jnp.zeros(8))
    assert [x.dtype for x in gradients] == [dtype] * 3 + [jnp.float32]


def test_large_scores_do_not_overflow():
    query, key, value, dout = _inputs(4, 2)
    # Hidden keys with scores near 1e6 must not reach the visible ones through the maximum.
    key = key.at[:, 30:].multiply(1e6)
    out, gradients = _run(query, key, value, dout, window=20)
    expected, exact = _exact([query, key, value, dout], window=20)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_allclose(out[:, :30], expected[:, :30], 1e-5, 1e-5)
    np.testing.assert_allclose(gradients[0][:, :30], exact[0][:, :30], 1e-4, 1e-4)


@pytest.mark.parametrize("window", [20, None])
def test_gradients_reach_visible_keys_only(window):
    segments = np.repeat([[1, 2]], [30, 40], axis=1).astype(np.int32)
    query, key, value, dout = _inputs(4, 2)
    times = np.array([10, 29, 30, 47, 69])
    one_hot = jnp.zeros((5, *dout.shape)).at[np.arange(5), :, times].set(1.0)
    run = functools.partial(_run, window=window, segments=segments)
    _, gradients = jax.vmap(lambda dout: run(query, key, value, dout))(one_hot)
    touched_query, touched_key, touched_value = (np.any(x, (1, 3, 4)) for x in gradients)
    first = np.maximum(times - (window or T) + 1, np.where(times < 30, 0, 30))
    reachable = (np.arange(T) >= first[:, None]) & (np.arange(T) <= times[:, None])
    np.testing.assert_array_equal(touched_value, reachable)
    # A query with one visible key has a constant softmax: no gradient for its key.
    several = reachable.sum(1) > 1
    np.testing.assert_array_equal(touched_key[several], reachable[several])
    np.testing.assert_array_equal(touched_query[several], times[several, None] == np.arange(T))
    assert not touched_key[~several][~reachable[~several]].any()


def test_vmap():
    inputs, sinks = _inputs(4, 2, B=4), jnp.array([0.5, -1.0, 3.0, 0.0])
    segments = np.tile(np.repeat([1, 2, 0], [13, 50, 7]), (4, 1)).astype(np.int32)
    segments[2:] = np.roll(segments[2:], 5, axis=1)
    split = [x.reshape(2, 2, *x.shape[1:]) for x in (*inputs, segments)]
    run = functools.partial(_run, window=10, sinks=sinks)
    out, gradients = jax.vmap(lambda *args: run(*args[:4], segments=args[4]))(*split)
    expected, exact = _exact(inputs, window=10, segments=segments, sinks=sinks)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, 1e-5, 1e-5)
    for gradient, wanted in zip(gradients[:3], exact[:3], strict=True):
        np.testing.assert_allclose(gradient.reshape(wanted.shape), wanted, 1e-5, 1e-5)
    np.testing.assert_allclose(gradients[3].sum(0), exact[3], 1e-5, 1e-5)


def test_batch_in_shard_map():
    query, key, value, dout = _inputs(2, 1, B=2, length=33)
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    by_row = PartitionSpec("x")

    def gradients(*inputs):
        return tuple(_run(*inputs, window=9)[1])

    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(by_row,) * 4, out_specs=(by_row,) * 3, check_vma=False
    )
    found = jax.jit(sharded)(query, key, value, dout)
    for left, right in zip(found, gradients(query, key, value, dout), strict=True):
        np.testing.assert_allclose(left, right, 1e-5, 1e-5)


def test_same_inputs_same_bits():
    inputs = _inputs(2, 1, dtype=jnp.bfloat16, length=33)
    first, second = (_run(*inputs, window=9) for _ in range(2))
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.array_equal(left, right)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"H": 48}, "head size 48"),
        ({"dtype": jnp.int32}, "int32"),
        ({"window": 0}, "window=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"logit_softcap": -1.0}, "logit_softcap=-1.0"),
        ({"query_offset": 1}, "70 queries for 70 keys"),
    ],
)
def test_what_it_cannot_honour_is_named(changes, match):
    shape = {name: changes[name] for name in ("H", "dtype") if name in changes}
    query, key, value, _ = _inputs(2, 1, **shape)
    options = {"window": 4, "scale": 1.0} | {k: v for k, v in changes.items() if k not in shape}
    with pytest.raises(ValueError, match=match):
        sliding_window_attention(query, key, value, **options)
