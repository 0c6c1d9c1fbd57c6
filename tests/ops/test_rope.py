import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops import rope
from lightning_jax.ops.rope import apply_rope, frequencies


def rope_table(positions, head_dim, base):
    return rope.rope_table(positions, frequencies(head_dim, base))


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


def _stretch(stretch, base, pairs=16, **fields):
    plain = frequencies(2 * pairs, base)
    return np.asarray(plain, np.float64), np.asarray(stretch(plain, **fields), np.float64)


def test_llama3_keeps_fast_pairs_and_stretches_slow_ones():
    fields = dict(factor=8.0, original_length=64, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, stretched = _stretch(rope.stretch_llama3, 10_000.0, **fields)
    turns = 64 * plain / (2 * np.pi)
    np.testing.assert_allclose(stretched[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(stretched[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    smooth = (turns[between] - 1) / 3
    want = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
    np.testing.assert_allclose(stretched[between], want, rtol=1e-5)
    assert between.any() and (turns > 4).any() and (turns < 1).any()


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_ramps_between_two_numbers_of_turns(truncate):
    fields = dict(factor=4.0, original_length=256, beta_fast=8.0, beta_slow=1.0)
    plain, stretched = _stretch(
        lambda frequency_R: rope.stretch_yarn(frequency_R, 1000.0, truncate=truncate, **fields),
        1000.0,
    )
    pair = np.arange(16)
    low, high = (16 * np.log(256 / (turns * 2 * np.pi)) / np.log(1000.0) for turns in (8.0, 1.0))
    if truncate:
        low, high = np.floor(low), np.ceil(high)
    share = np.clip((pair - low) / (high - low), 0, 1)
    np.testing.assert_allclose(stretched, plain * (1 - share) + plain / 4 * share, rtol=2e-5)
    assert stretched[0] == plain[0] and stretched[-1] == pytest.approx(plain[-1] / 4)


def test_yarn_attention_factor():
    assert rope.yarn_attention_factor(32.0) == pytest.approx(1.3465735902799727)
    assert rope.yarn_attention_factor(32.0, weight=0.0) == 1.0
