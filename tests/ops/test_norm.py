import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.norm import rms_norm


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 6)])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_matches_float64(shape, dtype, tolerance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape) * 3, dtype)
    scale = jnp.asarray(rng.normal(size=shape[-1:]), dtype)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-6)
    out = rms_norm(x, scale, eps=1e-6)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float64), exact * np.asarray(scale, np.float64), tolerance, tolerance
    )


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 6)])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_gradients_match_float64(shape, eps):
    rng = np.random.default_rng(0)
    x, dy, scale = rng.normal(size=shape) * 3, rng.normal(size=shape), rng.normal(size=shape[-1:])
    size, rms = shape[-1], np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)
    # Row by row, the Jacobian of x / rms(x) is (1 - x x' / (size rms^2)) / rms.
    dunit = dy * scale
    exact_dx = dunit / rms - x * np.sum(dunit * x, -1, keepdims=True) / (size * rms**3)
    exact_dscale = np.sum((dy * x / rms).reshape(-1, size), 0)
    norm = functools.partial(rms_norm, eps=eps)
    _, pull = jax.vjp(norm, jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32))
    dx, dscale = pull(jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(dx, exact_dx, 1e-4, 1e-5)
    np.testing.assert_allclose(dscale, exact_dscale, 1e-4, 1e-5)


def test_gradients_have_the_dtypes_of_their_arguments():
    x, scale = jnp.ones((3, 8), jnp.bfloat16), jnp.ones(8, jnp.float32)
    dx, dscale = jax.grad(lambda *a: rms_norm(*a, eps=1e-6).sum().astype(float), (0, 1))(x, scale)
    assert dx.dtype == jnp.bfloat16 and dscale.dtype == jnp.float32
    # A row of ones has its length divided out: no gradient but for rounding.
    np.testing.assert_allclose(dx.astype(float), 0.0, atol=1e-2)
    np.testing.assert_allclose(dscale, 3.0, 1e-2)


def test_bfloat16_does_not_overflow_and_zero_row_has_finite_gradient():
    huge = jnp.full((1, 8), 1e30, jnp.bfloat16)
    np.testing.assert_allclose(rms_norm(huge / 1e15, jnp.ones(8), eps=0.0).astype(float), 1.0)
    gradient = jax.grad(lambda x: rms_norm(x, jnp.ones(8), eps=1e-6).sum())(jnp.zeros((1, 8)))
    assert np.isfinite(gradient).all()


def test_wrong_scale_is_named():
    with pytest.raises(ValueError, match=r"scale has shape \(3,\): expected \(4,\)"):
        rms_norm(jnp.ones((2, 4)), jnp.ones(3), eps=1e-6)
