"""Token cross-entropy against a float64 oracle, values and gradients, whatever the chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.loss import cross_entropy, token_losses

M, D, V = 23, 8, 40
Z_WEIGHT = 1e-2


def inputs(scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden_MD = jnp.asarray(scale * rng.normal(size=(M, D)), dtype)
    head_DV = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets_M = jnp.asarray(rng.integers(0, 30, M), jnp.int32)
    weights_M = jnp.asarray(rng.integers(0, 3, M), jnp.float32)
    return hidden_MD, head_DV, targets_M, weights_M


def oracle(hidden_MD, head_DV, targets_M, weights_M, valid_vocab=None):
    """Returns the three sums and the gradients of their first, in float64."""
    hidden, head, weights = (np.asarray(a, np.float64) for a in (hidden_MD, head_DV, weights_M))
    targets = np.asarray(targets_M)
    logits = hidden @ head
    if valid_vocab is not None:
        logits[:, valid_vocab:] = -np.inf
    top = logits.max(1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(1))
    rows = np.arange(len(targets))
    nll_sum = np.sum(weights * (lse - logits[rows, targets]))
    z_sum = Z_WEIGHT * np.sum(weights * lse**2)
    softmax = np.exp(logits - lse[:, None])
    dlogits = softmax * (weights * (1 + 2 * Z_WEIGHT * lse))[:, None]
    dlogits[rows, targets] -= weights
    return (nll_sum + z_sum, nll_sum, z_sum), (dlogits @ head.T, hidden.T @ dlogits)


def sums_and_gradients(hidden_MD, head_DV, targets_M, weights_M, *, chunk, valid_vocab=None):
    def total(hidden_MD, head_DV, z_weight):
        sums = cross_entropy(
            hidden_MD,
            head_DV,
            targets_M,
            weights_M,
            z_weight=z_weight,
            chunk=chunk,
            valid_vocab=valid_vocab,
        )
        return sums[0], sums

    compute = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    # A traced weight, as in training.
    grads, sums = compute(hidden_MD, head_DV, jnp.float32(Z_WEIGHT))
    return sums, grads


def assert_matches(actual, expected, rtol=2e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(e).max() + 1e-12
        np.testing.assert_allclose(np.asarray(a, np.float64) / scale, e / scale, atol=rtol)


@pytest.mark.parametrize(
    ("chunk", "valid_vocab"), [(1, None), (7, None), (7, 33), (22, None), (M, 33), (1000, None)]
)
def test_matches_the_oracle(chunk, valid_vocab):
    args = inputs()
    actual = sums_and_gradients(*args, chunk=chunk, valid_vocab=valid_vocab)
    assert_matches(actual, oracle(*args, valid_vocab=valid_vocab))
    if valid_vocab is not None:
        assert not np.any(actual[1][1][:, valid_vocab:])


def test_large_logits_stay_finite():
    args = inputs(scale=300.0)
    assert_matches(sums_and_gradients(*args, chunk=5), oracle(*args))


def test_bfloat16_hidden_states_keep_a_float32_gradient_of_the_head():
    args = inputs(dtype=jnp.bfloat16)
    rounded_head = args[1].astype(jnp.bfloat16).astype(jnp.float32)
    actual = sums_and_gradients(*args, chunk=5)
    assert actual[1][0].dtype == jnp.bfloat16
    assert actual[1][1].dtype == jnp.float32
    sums, grads = oracle(args[0], rounded_head, *args[2:])
    assert_matches(actual[0], sums)
    assert_matches(actual[1], grads, rtol=1e-2)


def test_weight_zero_needs_no_valid_target_and_gives_no_gradient():
    hidden_MD, head_DV, targets_M, _ = inputs()
    none = jnp.zeros(M)
    sums, grads = sums_and_gradients(hidden_MD, head_DV, targets_M, none, chunk=4)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((sums, grads)))
    some = none.at[3].set(2.0)
    targets = jnp.where(some > 0, targets_M, -1)
    expected = sums_and_gradients(hidden_MD, head_DV, targets_M, some, chunk=4)
    assert_matches(sums_and_gradients(hidden_MD, head_DV, targets, some, chunk=4), expected)


def test_without_gradients_the_sums_are_the_same():
    args = inputs()
    plain = jax.jit(lambda *a: cross_entropy(*a, z_weight=Z_WEIGHT, chunk=5))(*args)
    assert_matches(plain, sums_and_gradients(*args, chunk=5)[0])


def test_gradient_is_scaled_and_only_that_of_the_loss():
    hidden_MD, *args = inputs()

    def pick(which, factor):
        return jax.grad(lambda h: factor * cross_entropy(h, *args, z_weight=0.1, chunk=5)[which])

    np.testing.assert_allclose(pick(0, -3.0)(hidden_MD), -3 * pick(0, 1.0)(hidden_MD), rtol=1e-6)
    assert not any(np.any(pick(which, 1.0)(hidden_MD)) for which in (1, 2))


def test_sums_of_halves_add_up():
    hidden_MD, head_DV, targets_M, weights_M = (x[:22] if len(x) == M else x for x in inputs())
    sums = jax.jit(lambda *args: jnp.stack(cross_entropy(*args, z_weight=Z_WEIGHT, chunk=4)))
    whole = sums(hidden_MD, head_DV, targets_M, weights_M)
    halves = [
        sums(hidden_MD[part], head_DV, targets_M[part], weights_M[part])
        for part in (slice(0, 11), slice(11, 22))
    ]
    np.testing.assert_allclose(halves[0] + halves[1], whole, rtol=1e-6)


def test_never_holds_more_than_a_chunk_of_logits():
    hidden_MD, head_DV, targets_M, weights_M = inputs()

    def loss(hidden_MD, head_DV):
        return cross_entropy(hidden_MD, head_DV, targets_M, weights_M, z_weight=0.1, chunk=6)[0]

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden_MD, head_DV))
    assert f"f32[6,{V}]" in text
    assert f"f32[{M},{V}]" not in text
    assert f"f32[4,6,{V}]" not in text


def test_tokens_split_over_devices_stay_split():
    hidden_MD, head_DV, targets_M, _ = (x[:16] if len(x) == M else x for x in inputs())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    args = [jax.device_put(x, split) for x in (hidden_MD, targets_M)]
    compiled = jax.jit(lambda h, t: token_losses(h, head_DV, t, chunk=8)).lower(*args).compile()
    logits_MV = np.asarray(hidden_MD, np.float64) @ np.asarray(head_DV, np.float64)
    np.testing.assert_allclose(compiled(*args)[1], np.log(np.exp(logits_MV).sum(1)), rtol=1e-5)
    assert "all-gather" not in compiled.as_text()


def test_bad_chunk_is_refused():
    hidden_MD, head_DV, targets_M, weights_M = inputs()
    with pytest.raises(ValueError, match="chunk = 0: must be at least 1"):
        token_losses(hidden_MD, head_DV, targets_M, chunk=0)
    with pytest.raises(ValueError, match="chunk = -1: must be at least 1"):
        cross_entropy(hidden_MD, head_DV, targets_M, weights_M, z_weight=0.0, chunk=-1)
