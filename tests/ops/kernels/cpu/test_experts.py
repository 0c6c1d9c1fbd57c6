"""The block loops themselves: block boundaries, both block sizes, memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.experts import grouped_mlp, routed_experts
from lightning_jax.ops.kernels.cpu import experts as kernel
from lightning_jax.ops.kernels.cpu import narrow
from lightning_jax.ops.routing import Choices, sort_slots
from lightning_jax.runtime import compiler


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
        choices = Choices(index, jnp.where(index < len(w[0]), gate, 0), len(w[0]))
        return routed_experts(x, choices, *w, implementation="onehot")

    return value_and_grads(experts, *args)


@functools.partial(jax.jit, static_argnums=0)
def blocked(sizes, *args):
    def experts(x, index, gate, *w):
        order = sort_slots(index, len(w[0]))
        return kernel._blocked(sizes, None, x, gate, order, jnp.int32(0), w, ())

    return value_and_grads(experts, *args)


def chosen_sizes(x, index, gate, *w):
    return kernel.blocked_experts(x, Choices(index, gate, len(w[0])), w)


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


@pytest.mark.parametrize("sizes", [(8,), (16, 4)])
@pytest.mark.parametrize("groups", [(1, 0, 0), (0, 17, 4), (40, 0, 7), (0, 0, 0)])
def test_sorted_rows_at_block_boundaries(sizes, groups, monkeypatch):
    monkeypatch.setattr(kernel, "block_sizes", lambda slots, experts: sizes)
    x, _, _, *w = arguments((0,) * len(groups), slots=100)
    size = jnp.asarray(groups)

    @functools.partial(jax.jit, static_argnums=0)
    def grads(implementation, x, *w):
        def loss(x, *w):
            y = grouped_mlp(x, size, *w, implementation=implementation)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, argnums=range(4), has_aux=True)(x, *w)

    got, want = (jax.tree.leaves(grads(name, x, *w)) for name in ("blocked", "onehot"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


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


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_unit_of_a_stack_is_not_copied(dtype, multiplied, monkeypatch):
    """A scan over the units of a stack reads the experts that it uses where they lie."""
    monkeypatch.setattr(narrow, "multiplies_bfloat16", lambda: multiplied)
    U, M, E, d, f = 3, 3, 32, 64, 64
    shape = lambda *s: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    weights = (shape(U, E, d, f), shape(U, E, d, f), shape(U, E, f, d))
    biases = (shape(U, E, f), shape(U, E, f), shape(U, E, d))

    def layers(x, index, gate, weights, biases):
        def layer(x, unit):
            choices = Choices(index, gate, E)
            return x + kernel.blocked_experts(x, choices, weights, biases, unit=unit), None

        return jax.lax.scan(layer, x, jnp.arange(U))[0]

    index, gate = jax.ShapeDtypeStruct((M, 2), jnp.int32), jax.ShapeDtypeStruct((M, 2), jnp.float32)
    program = jax.jit(layers, compiler_options=compiler.options())
    compiled = program.lower(shape(M, d), index, gate, weights, biases).compile()
    experts_of_a_unit = E * d * f * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < experts_of_a_unit
