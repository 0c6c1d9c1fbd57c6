"""Rows split over devices: attention with the keys of earlier shards is attention of whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lightning_jax.ops.attention import dot_product_attention
from lightning_jax.ops.kv_cache import KV
from lightning_jax.ops.mask import Mask
from lightning_jax.ops.sequence_parallel import with_earlier_keys
from tests.ops.kernels.dense_attention import dense_attention

LENGTH, HEADS, KV_HEADS, HEAD = 48, 4, 2, 8
SINKS = jnp.array([0.5, -1.0, 2.0, 0.0])
pytestmark = pytest.mark.usefixtures("compile_afresh")


def segments():
    """Documents across the borders of all shards; nothing but padding; one document; gaps."""
    index = np.arange(LENGTH)
    rows = [
        np.select([index < 5, index < 11, index < 40], [1, 2, 3], 0),
        np.zeros(LENGTH),
        np.ones(LENGTH),
        np.where((index >= 13) & (index < 27), 0, 1 + (index > 30)),
    ]
    return np.stack(rows).astype(np.int32)


def inputs():
    """Queries, keys, values and a weight of each output."""
    rng = np.random.default_rng(0)
    shapes = [(4, LENGTH, heads, HEAD) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def split(shards, window, implementation):
    """(queries, keys, values, sinks, segments) -> out_BTNH, over a mesh of some shards."""

    def attend(query, key, value, sinks, segment_BT):
        kv, segment_BS = with_earlier_keys(KV(key, value), segment_BT, window=window, axis="shards")
        offset = segment_BS.shape[1] - segment_BT.shape[1]
        mask = Mask(None, None, segment_BT, segment_BS, window=window, query_offset=offset)
        return dot_product_attention(
            query,
            kv.key_BSKH,
            kv.value_BSKH,
            mask,
            sinks_N=sinks,
            implementation=implementation,
        )

    mesh = Mesh(np.array(jax.devices()[:shards]), ("shards",))
    row = P(None, "shards")
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(row, row, row, P(), row), out_specs=row, check_vma=False
    )


@functools.cache
def whole(window):
    """Output and gradients of whole rows in float64."""
    *arrays, dout = inputs()
    segment_BT = jnp.asarray(segments())
    visible = Mask(None, None, segment_BT, segment_BT, window=window).as_array(LENGTH, LENGTH)
    return dense_attention(
        *arrays, dout, visible_BTS=np.asarray(visible), scale=HEAD**-0.5, sinks=np.asarray(SINKS)
    )


def all_windows():
    """Around the length of a shard and of a row, on 4 shards; the ends of the range on others."""
    T = LENGTH // 4
    for window in (1, 2, T - 1, T, T + 1, 2 * T + 1, 3 * T + 1, LENGTH - 1, LENGTH, 1000, None):
        yield 4, window, "reference"
    for shards in (2, 8):
        for window in (1, 2, 13, 30, None):
            yield shards, window, "reference"
    for window in (9, 2 * T + 1, None):
        yield 4, window, "xla_banded"


@pytest.mark.parametrize("shards, window, implementation", list(all_windows()))
def test_shards_attend_as_whole_rows_do(shards, window, implementation):
    attend = split(shards, window, implementation)

    @jax.jit
    def run(query, key, value, dout):
        function = lambda *a: attend(*a, segments())  # noqa: E731
        out, pull = jax.vjp(function, query, key, value, SINKS)
        return out, pull(dout)

    out, gradients = run(*inputs())
    expected, oracle = whole(window)
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)
    for got, want in zip(gradients, oracle, strict=True):
        np.testing.assert_allclose(got, want, 1e-5, 1e-5)
    padding = segments() == 0
    for array in (out, *gradients[:3]):
        assert not np.asarray(array)[padding].any()
