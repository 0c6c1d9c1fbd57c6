"""Attention over a mesh: split heads with caches, split positions, and the collectives of both."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config.errors import UserError
from tests.tiny import mesh_of, random_batch, tiny_model

pytestmark = pytest.mark.usefixtures("compile_afresh")
BATCH, PROMPT, LENGTH = 4, 11, 16


def dense_model(unit="LlGg", **changes):
    return tiny_model(unit=unit, num_units=2, moe__num_experts=0, **changes)


def params_of(config):
    """Random parameters, also those that start at zero or one, on no device yet."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: (0.3 * rng.normal(size=a.shape)).astype(np.float32), lm.abstract_params(config)
    )


@functools.cache
def fed_through_caches(config, sizes):
    """Hidden states of a prompt longer than the window, then of token after token, and caches."""
    mesh = mesh_of(**dict(sizes))

    @jax.jit
    def forward(params, tokens, segments, cache, start):
        model = lm.LightningLM(config)
        out = model.apply({"params": params}, tokens, None, segments, cache=cache, start_B=start)
        return out.hidden_BTD, out.cache

    batch = random_batch(BATCH, LENGTH, config.vocab_size)
    segments = np.ones_like(batch.tokens)
    segments[1, PROMPT - 3 : PROMPT] = 0
    with jax.set_mesh(mesh):
        placement = lm.cache_shardings(config, BATCH, LENGTH, mesh)
        cache = jax.jit(lambda: lm.init_cache(config, BATCH, LENGTH), out_shardings=placement)()
        params = jax.device_put(
            params_of(config), sharding.tree_shardings(lm.logical_axes(config), mesh)
        )
        found, start = [], np.zeros(BATCH, np.int32)
        for first, last in [(0, PROMPT)] + [(t, t + 1) for t in range(PROMPT, LENGTH)]:
            part = segments[:, first:last]
            hidden, cache = forward(params, batch.tokens[:, first:last], part, cache, start)
            found.append(np.asarray(hidden) * (part != 0)[..., None])
            start = start + (part != 0).sum(axis=1, dtype=np.int32)
    key = cache.units["0_L"].key_UBSKH
    return np.concatenate(found, axis=1), jax.device_get(cache), key.sharding.shard_shape(key.shape)


@pytest.mark.slow
def test_heads_and_their_caches_may_be_split():
    config = dense_model(
        attention__sinks=True,
        attention__output_gate=True,
        attention__qkv_bias=True,
        attention__qk_norm="projection",
    )
    expected, cache, whole = fed_through_caches(config, ())
    found, split_cache, part = fed_through_caches(config, (("data", 2), ("tensor", 2)))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), split_cache, cache)
    units, batch, slots, heads, size = whole
    assert part == (units, batch // 2, slots, heads // 2, size)


@functools.cache
def gradients(sizes):
    """Gradients of all parameters in float32, with all that attention may have."""
    options = dict(attention__sinks=True, attention__output_gate=True, attention__qkv_bias=True)
    config = dense_model("LG", attention__out_bias=True, **options)
    config = dataclasses.replace(config, num_units=1)
    mesh = mesh_of(**dict(sizes))
    batch = random_batch(BATCH, LENGTH, config.vocab_size)

    def loss(params):
        model = lm.LightningLM(config, train=True)
        out = model.apply({"params": params}, batch.tokens, None, batch.segment_ids)
        return jnp.sum(jnp.sin(out.hidden_BTD))

    with jax.set_mesh(mesh):
        placement = sharding.tree_shardings(lm.logical_axes(config), mesh)
        return jax.device_get(jax.jit(jax.grad(loss))(jax.device_put(params_of(config), placement)))


@pytest.mark.slow
def test_gradients_of_split_heads_are_those_of_one_device():
    expected, found = gradients(()), gradients((("fsdp", 2), ("tensor", 2)))
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        where = jax.tree_util.keystr(path)
        scale = np.abs(want).max()
        assert scale > 0, where
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale, err_msg=where)


def test_caches_are_refused_where_positions_are_split():
    mesh = mesh_of(sequence=2)
    message = "^mesh.sequence = 2: caches are not split over positions; use 1 for prefill and dec"
    with jax.set_mesh(mesh), pytest.raises(UserError, match=message):
        lm.cache_shardings(dense_model(), BATCH, LENGTH, mesh)


@functools.cache
def compiled_gradient(unit, length=2048):
    """The program of a gradient on 4 shards of a row, windows of 8."""
    config, mesh = dense_model(unit, remat="full"), mesh_of(sequence=4)
    assert config.attention.window == 8

    def loss(params, tokens, segments):
        out = lm.LightningLM(config, train=True).apply({"params": params}, tokens, None, segments)
        return jnp.sum(out.hidden_BTD**2)

    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            lm.abstract_params(config),
            sharding.tree_shardings(lm.logical_axes(config), mesh),
        )
        row = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding.batch_sharding(mesh))
        return jax.jit(jax.grad(loss)).lower(params, row, row).compile().as_text()


def results(text, operation):
    """Shapes of all results of an operation, those in tuples too."""
    lines = re.findall(rf"= (.*) {operation}(?:-start)?\(", text)
    found = [re.findall(r"\[([\d,]*)\]", line) for line in lines]
    return [tuple(map(int, dims.split(","))) for line in found for dims in line if dims]


def key_exchanges(unit):
    """Shapes [B, rows, K, H] of what the program of a unit sends of keys and values."""
    names = "collective-permute", "all-gather", "reduce-scatter"
    found = [results(compiled_gradient(unit), name) for name in names]
    return [[shape[1] for shape in shapes if shape[2:] == (2, 8)] for shapes in found]


@pytest.mark.slow
def test_local_layers_send_a_halo_and_global_layers_gather():
    """Keys and values, in both passes and in the recomputed forward pass; none for a borrower."""
    assert key_exchanges("Ll") == [[7] * 6, [], []]
    assert key_exchanges("Gg") == [[], [2048] * 4, [512] * 2]


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["Ll", "Gg"])
def test_no_array_is_as_large_as_length_times_length(unit):
    dims = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled_gradient(unit))
    assert max(np.prod(list(map(int, each.split(",")))) for each in dims) < 2048**2
