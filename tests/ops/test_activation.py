"""The gated unit against its formula in float64, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax.ops.activation import gated_unit

GRID = np.linspace(-9, 9, 37)
GATE, UP = (a.ravel() for a in np.meshgrid(GRID, GRID))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_swiglu():
    want = GATE * sigmoid(GATE) * UP
    np.testing.assert_allclose(gated_unit(GATE.astype(np.float32), UP), want, atol=2e-5)


def test_clamped():
    gate, up = np.minimum(GATE, 7.0), np.clip(UP, -7.0, 7.0)
    want = gate * sigmoid(1.702 * gate) * (up + 1)
    got = gated_unit(GATE.astype(np.float32), UP.astype(np.float32), clamp=7.0)
    np.testing.assert_allclose(got, want, atol=5e-5)


def test_nothing_flows_back_through_what_was_cut():
    gradient = jax.grad(lambda g, u: gated_unit(g, u, clamp=7.0), argnums=(0, 1))
    assert gradient(jnp.float32(8.0), jnp.float32(1.0))[0] == 0
    assert gradient(jnp.float32(1.0), jnp.float32(-8.0))[1] == 0
    assert gradient(jnp.float32(-8.0), jnp.float32(1.0))[0] != 0


def test_keeps_the_dtype():
    assert gated_unit(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
