"""The block loops themselves: block boundaries, both block sizes, memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.experts import routed_experts
from lightning_jax.ops.kernels.cpu import experts as kernel
from lightning_jax.ops.routing import Routing


def arguments(groups, slots, d=8, f=6):
    """Two slots per token, `groups[e]` of them filled with expert e, in a random order."""
    rng = np.random.default_rng(0)
    E = len(groups)
    index = np.full(slots, E, np.int32)
    index[: sum(groups)] = np.repeat(np.arange(E), groups)
    index = rng.permutation(index).reshape(-1, 2)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.4, jnp.float32)  # noqa: E731
    gate = jnp.asarray(rng.random(index.shape), jnp.float32)
    weights = (draw(E, d, f), draw(E, d, f), draw(E, f, d))
    return draw(slots // 2, d), jnp.asarray(index), gate, *weights


def value_and_grads(f, x, index, gate, *w):
    def loss(x, gate, *w):
        y = f(x, index, gate, *w)
        return jnp.sum(jnp.sin(y)), y

    grads, y = jax.grad(loss, argnums=range(5), has_aux=True)(x, gate, *w)
    return (y, *grads)


@jax.jit
def onehot(*args):
    def experts(x, index, gate, *w):
        zeros = jnp.zeros((x.shape[0], w[0].shape[0]))
        routing = Routing(index, jnp.where(index < len(w[0]), gate, 0), zeros, zeros)
        return routed_experts(x, routing, *w, implementation="onehot")

    return value_and_grads(experts, *args)


@functools.partial(jax.jit, static_argnums=0)
def blocked(sizes, *args):
    def experts(x, index, gate, *w):
        return kernel._blocked(sizes, None, x, index, gate, w, ())

    return value_and_grads(experts, *args)


def chosen_sizes(x, index, gate, *w):
    return kernel.blocked_experts(x, index, gate, w)


@pytest.mark.parametrize("sizes", [(8,), (16, 4)])
@pytest.mark.parametrize(
    "groups",
    [
        (1, 0, 0, 0, 0),
        (0, 0, 0, 0, 1),
        (4, 16, 0, 0, 0),
        (15, 17, 16, 8, 44),
        (0, 33, 0, 3, 0),
        (0, 100, 0, 0, 0),
        (32, 0, 31, 1, 36),
    ],
)
def test_block_boundaries(sizes, groups):
    args = arguments(groups, slots=100)
    for a, b in zip(blocked(sizes, *args), onehot(*args), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_chosen_sizes_match_the_oracle_and_repeat_bit_for_bit():
    args = arguments((130, 100, 400), slots=640)
    assert kernel.block_sizes(640, 3) == (128, 32)
    kernel_grads = jax.jit(functools.partial(value_and_grads, chosen_sizes))
    first, again = kernel_grads(*args), kernel_grads(*args)
    for a, b, c in zip(first, again, onehot(*args), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=5e-5)


def test_block_sizes():
    assert kernel.block_sizes(4096 * 4, 64) == (256, 64, 16)
    assert kernel.block_sizes(4096 * 4, 128) == (128, 32)
    assert kernel.block_sizes(4, 64) == (1,)
    assert kernel.block_sizes(64 * 4, 32) == (8,)
    for slots in (1, 7, 100, 1000, 10_000, 1_000_000):
        for experts in (1, 3, 8, 256):
            sizes = kernel.block_sizes(slots, experts)
            assert list(sizes) == sorted(set(sizes), reverse=True) and sizes[0] <= 256


def test_neither_weights_nor_their_gradients_are_copied():
    M, E, d, f = 128, 32, 64, 64
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    w = (shape(E, d, f), shape(E, d, f), shape(E, f, d))
    args = (shape(M, d), jax.ShapeDtypeStruct((M, 2), jnp.int32), shape(M, 2), *w)
    grads = jax.jit(functools.partial(value_and_grads, chosen_sizes))
    temporary = grads.lower(*args).compile().memory_analysis().temp_size_in_bytes
    one_weight = E * d * f * 4
    assert temporary < one_weight
