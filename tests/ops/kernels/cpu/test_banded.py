import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightning_jax.ops.kernels.cpu import narrow
from lightning_jax.ops.kernels.cpu.banded import banded_attention
from lightning_jax.ops.kernels.cpu.blocks import BlockSizes, block_sizes
from tests.ops.kernels import dense_attention
from tests.ops.kernels.dense_attention import last_queries, packed_rows, random_inputs

BLOCKS = BlockSizes(query=16, key=32)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def _inputs(T, N, K, dtype=jnp.float32, B=2, H=8):
    return random_inputs(T, N, K, H, dtype, B)


def _attend(blocks=BLOCKS):
    return functools.partial(banded_attention, blocks=blocks)


def _options(inputs, window, segments=None, sinks=None, softcap=None):
    scale = inputs[0].shape[-1] ** -0.5
    return dict(window=window, segments=segments, sinks=sinks, scale=scale, logit_softcap=softcap)


def _run(inputs, *options):
    return dense_attention.run(_attend(), *inputs, **_options(inputs, *options))


def _exact(inputs, *options):
    return dense_attention.exact(inputs, **_options(inputs, *options))


def _check(inputs, window, segments, sinks, tolerance, blocks=BLOCKS, softcap=None):
    options = _options(inputs, window, segments, sinks, softcap)
    return dense_attention.check(_attend(blocks), inputs, tolerance, **options)


@pytest.mark.parametrize(
    "T, window, N, K",
    [
        (70, 1, 2, 2),
        (70, 17, 8, 1),
        (70, None, 8, 2),
        (9, 4, 2, 1),
        slow(70, 15, 2, 1),
        slow(64, 16, 4, 1),
        slow(70, 40, 4, 2),
        slow(70, 1000, 8, 2),
        slow(9, None, 2, 2),
    ],
)
def test_windows_lengths_and_head_groups(T, window, N, K):
    _check(_inputs(T, N, K), window, None, jnp.linspace(-1.0, 3.0, N), 1e-5)


@pytest.mark.parametrize(
    "window, with_sinks", [(20, False), (None, True), slow(20, True), slow(1, True), slow(1, False)]
)
def test_packed_rows_and_padding(window, with_sinks):
    inputs, segments = _inputs(70, 4, 2), packed_rows(70)
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0]) if with_sinks else None
    out, (dquery, dkey, dvalue, *_) = _check(inputs, window, segments, sinks, 1e-5)
    for array in (out, dquery, dkey, dvalue):
        assert (np.asarray(array)[segments == 0] == 0).all()


@pytest.mark.parametrize(
    "window, offset, packed",
    [
        (20, 1, True),
        (20, 37, False),
        (None, 37, True),
        slow(1, 69, False),
        slow(20, 19, True),
        slow(20, 20, False),
        slow(20, 21, True),
        slow(20, 69, True),
        slow(None, 1, False),
        slow(None, 32, True),
        slow(None, 69, True),
        slow(1, 1, True),
        slow(1, 2, False),
    ],
)
def test_queries_are_the_last_of_the_keys(window, offset, packed):
    inputs, segments = last_queries(_inputs(70, 4, 2), offset), packed_rows(70) if packed else None
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0])
    for blocks in (BLOCKS, None):
        _check(inputs, window, segments, sinks, 1e-5, blocks)


@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("window", [20, slow(None)])
def test_bfloat16(window, multiplied, monkeypatch):
    monkeypatch.setattr(narrow, "multiplies_bfloat16", lambda: multiplied)
    inputs = _inputs(70, 8, 2, jnp.bfloat16)
    _check(inputs, window, packed_rows(70), jnp.zeros(8), 4e-2)


@pytest.mark.parametrize("window, softcap", [(20, 0.7), slow(None, 0.7), slow(20, 50.0)])
def test_softcap(window, softcap):
    query, *rest = _inputs(70, 4, 2)
    inputs = 3 * query, *rest
    _check(inputs, window, packed_rows(70), jnp.linspace(-1.0, 1.0, 4), 2e-5, softcap=softcap)


@pytest.mark.parametrize("window", [24, slow(None)])
def test_default_blocks(window):
    _check(_inputs(200, 2, 1, B=1), window, None, None, 1e-5, blocks=None)


@pytest.mark.parametrize("window", [20, slow(None)])
def test_large_scores_do_not_overflow(window):
    query, key, value, dout = _inputs(70, 4, 2)
    # Hidden keys with scores near 1e6 must not reach the visible ones through the maximum.
    key = key.at[:, 30:].multiply(1e6)
    inputs = [query, key, value, dout]
    (out, gradients), (expected, exact) = _run(inputs, window), _exact(inputs, window)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_allclose(out[:, :30], expected[:, :30], 1e-5, 1e-5)
    np.testing.assert_allclose(gradients[0][:, :30], exact[0][:, :30], 1e-4, 1e-4)


@pytest.mark.parametrize("window", [20, slow(None)])
def test_gradients_reach_visible_keys_only(window):
    segments = np.repeat([[1, 2]], [30, 40], axis=1).astype(np.int32)
    query, key, value, _ = _inputs(70, 4, 2, B=1)
    times = np.array([10, 29, 30, 47, 69])
    one_hot = jnp.zeros((5, 1, 70, 4, 8)).at[np.arange(5), :, times].set(1.0)
    _, gradients = jax.vmap(lambda dout: _run([query, key, value, dout], window, segments))(one_hot)
    touched_query, touched_key, touched_value = (np.any(x, (1, 3, 4)) for x in gradients)
    first = np.maximum(times - (window or 70) + 1, np.where(times < 30, 0, 30))
    reachable = (np.arange(70) >= first[:, None]) & (np.arange(70) <= times[:, None])
    np.testing.assert_array_equal(touched_value, reachable)
    # A query with one visible key has a constant softmax: no gradient for its key.
    several = reachable.sum(1) > 1
    np.testing.assert_array_equal(touched_key[several], reachable[several])
    np.testing.assert_array_equal(touched_query[several], times[several, None] == np.arange(70))
    assert not touched_key[~several][~reachable[~several]].any()


def test_vmap():
    inputs, sinks = _inputs(40, 4, 2, B=6), jnp.array([0.5, -1.0, 3.0, 0.0])
    segments = np.tile(np.repeat([1, 2, 0], [13, 20, 7]), (6, 1)).astype(np.int32)
    segments[3:] = np.roll(segments[3:], 5, axis=1)
    split = [x.reshape(3, 2, *x.shape[1:]) for x in (*inputs, segments)]

    out, gradients = jax.vmap(lambda *args: _run(args[:4], 10, args[4], sinks))(*split)
    expected, exact = _exact(inputs, 10, segments, sinks)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, 1e-5, 1e-5)
    for gradient, wanted in zip(gradients[:3], exact[:3], strict=True):
        np.testing.assert_allclose(gradient.reshape(wanted.shape), wanted, 1e-5, 1e-5)
    np.testing.assert_allclose(gradients[3].sum(0), exact[3], 1e-5, 1e-5)


@pytest.mark.parametrize("window", [20, slow(None)])
def test_batch_sharding_needs_no_communication(window):
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), "x"), PartitionSpec("x"))
    inputs = _inputs(70, 4, 2, B=4)

    @jax.jit
    def gradient(query, key, value, dout):
        attend = functools.partial(banded_attention, window=window, blocks=BLOCKS)
        return jax.vjp(attend, query, key, value)[1](dout)

    sharded = [jax.device_put(x, sharding) for x in inputs]
    compiled = gradient.lower(*sharded).compile()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in compiled.as_text()
    _, exact = _exact(inputs, window)
    for left, right in zip(compiled(*sharded), exact, strict=True):
        np.testing.assert_allclose(left, right, 1e-5, 1e-5)


def _equations(jaxpr):
    """All equations of a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_blocks_of_queries_are_walked_however_many_the_keys():
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32) for length in (40, 5000, 5000)]
    attend = functools.partial(banded_attention, window=64, query_offset=4960, blocks=BLOCKS)
    equations = _equations(jax.make_jaxpr(attend)(*shapes).jaxpr)
    assert [x.params["length"] for x in equations if x.primitive.name == "scan"] == [3]


@pytest.mark.parametrize("window", [128, None])
def test_no_quadratic_array(window):
    L, N, K, H = 2048, 4, 2, 16
    shapes = [jax.ShapeDtypeStruct((1, L, heads, H), jnp.float32) for heads in (N, K, K)]
    step = jax.jit(jax.grad(lambda *a: banded_attention(*a, window=window).sum(), (0, 1, 2)))
    traced = step.trace(*shapes)
    results = [var.aval for x in _equations(traced.jaxpr.jaxpr) for var in x.outvars]
    assert max(math.prod(getattr(value, "shape", ())) for value in results) < L * L / 4
    temporary = traced.lower().compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * L * L


@pytest.mark.parametrize("group", [1, 3, 4, 8, 64])
@pytest.mark.parametrize("head_dim", [8, 64, 256])
@pytest.mark.parametrize("length, window", [(1, None), (100, 7), (4096, 512), (65536, None)])
def test_block_sizes_fit_rows_and_cache(length, window, head_dim, group):
    blocks = block_sizes(length, window, head_dim, group)
    assert blocks.query % 16 == blocks.key % 16 == 0
    assert blocks.query * blocks.key <= 2**17
    assert blocks.query <= max(16, length)


def test_block_sizes_after_other_keys():
    # A band from the first query on, and blocks no longer than the queries.
    assert block_sizes(256, 512, 64, 4, offset=512) == block_sizes(4096, 512, 64, 4)
    assert block_sizes(40, None, 64, 4, offset=4096).query == 48
    assert block_sizes(2048, None, 64, 2, offset=2048).query == 256


def test_block_sizes_of_the_measured_shapes():
    assert block_sizes(4096, 512, 64, 4) == BlockSizes(query=64, key=576)
    assert block_sizes(512, 512, 64, 4) == BlockSizes(query=128, key=256)
    assert block_sizes(2048, None, 64, 2) == BlockSizes(query=256, key=256)


def test_bad_block_size_is_named():
    with pytest.raises(ValueError, match="key=0"):
        BlockSizes(query=1, key=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window=0"),
        ({"query_offset": -1}, "query_offset=-1"),
        ({"query_offset": 2}, "9 queries for 9 keys: at query_offset=2 there must be 11 keys"),
    ],
)
def test_bad_bands_are_named(change, message):
    query, key, value, _ = _inputs(9, 2, 1)
    with pytest.raises(ValueError, match=message):
        banded_attention(query, key, value, **change)
