import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.rope import apply_rope, rope_table


def _rotate(x, positions, base):
    """float64, one complex number per pair (i, i + H/2)."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("base", [100.0, 10_000.0, 500_000.0])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-4), (jnp.bfloat16, 3e-2)])
def test_matches_complex_rotation(base, dtype, tolerance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 3, 8)), dtype)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 999, 2000]])
    out = apply_rope(x, *rope_table(jnp.asarray(positions), 8, base))
    assert out.dtype == dtype
    exact = _rotate(np.asarray(x, np.float64), positions, base)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=tolerance)


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i, j):
        turned = [
            apply_rope(x, *rope_table(jnp.full((1, 1), p), 16, 1e4)) for x, p in ((q, i), (k, j))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)


def test_position_zero_is_identity_and_base_may_be_traced():
    x = jnp.ones((1, 1, 2, 4))
    np.testing.assert_array_equal(apply_rope(x, *rope_table(jnp.zeros((1, 1)), 4, 1e4)), x)
    positions = jnp.arange(6)[None]
    traced = jax.jit(lambda base: rope_table(positions, 4, base))(1e4)
    for left, right in zip(traced, rope_table(positions, 4, 1e4), strict=True):
        assert left.shape == (1, 6, 2) and left.dtype == jnp.float32
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_bad_sizes_are_named():
    table = rope_table(jnp.zeros((1, 1)), 4, 1e4)
    with pytest.raises(ValueError, match="head_dim=5"):
        rope_table(jnp.zeros((1, 1)), 5, 1e4)
    with pytest.raises(ValueError, match="head_dim=5"):
        apply_rope(jnp.ones((1, 1, 1, 5)), *table)
    with pytest.raises(ValueError, match="2 frequencies: head_dim=8 needs 4"):
        apply_rope(jnp.ones((1, 1, 1, 8)), *table)
