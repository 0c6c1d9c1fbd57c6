"""Rows of a table that devices share, and the gradient of each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lightning_jax.ops.embed import lookup

V, D = 24, 4


@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_a_split_table_gives_the_same_rows_and_gradients(shards, dtype):
    rng = np.random.default_rng(0)
    table_VD = jnp.asarray(rng.normal(size=(V, D)), dtype)
    tokens_BT = np.array([[0, 5, 5, 23], [12, 11, 0, 5]] * 4, np.int32)
    factor_BTD = jnp.asarray(rng.integers(-4, 5, (*tokens_BT.shape, D)), dtype)  # exact sums
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8 // shards, shards), ("data", "vocab"), axis_types=(auto, auto))

    def split(table_VD, tokens_BT):
        return lookup(table_VD, tokens_BT, vocab_axes=("vocab",))

    with jax.set_mesh(mesh):
        specs = P("vocab"), P("data")
        run = jax.shard_map(split, in_specs=specs, out_specs=P("data"), check_vma=False)
        x_BTD, pullback = jax.vjp(jax.jit(lambda table_VD: run(table_VD, tokens_BT)), table_VD)
        x_BTD, (dtable_VD,) = jax.device_get((x_BTD, pullback(factor_BTD)))
    assert x_BTD.dtype == dtable_VD.dtype == dtype
    np.testing.assert_array_equal(x_BTD, np.asarray(table_VD)[tokens_BT])
    expected_VD = np.zeros((V, D))
    np.add.at(expected_VD, tokens_BT, np.asarray(factor_BTD, np.float64))
    np.testing.assert_array_equal(dtable_VD.astype(np.float64), expected_VD)
    absent = np.setdiff1d(np.arange(V), tokens_BT)
    assert len(absent) == 19 and not dtable_VD[absent].any()


def test_gradients_of_a_frequent_token_add_up_in_float32():
    tokens_BT = np.zeros((1, 1000), np.int32)
    x_BTD, pullback = jax.vjp(lambda t: lookup(t, tokens_BT), jnp.ones((V, D), jnp.bfloat16))
    (dtable_VD,) = pullback(jnp.ones_like(x_BTD))
    assert dtable_VD.dtype == jnp.bfloat16
    # A sum in bfloat16 stops at 256.
    np.testing.assert_array_equal(dtable_VD[0], 1000.0)
    assert not dtable_VD[1:].any()
