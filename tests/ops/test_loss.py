"""Token cross-entropy against a float64 oracle, values and gradients, whatever the chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lightning_jax.ops.collectives import total
from lightning_jax.ops.loss import cross_entropy, target_ranks, token_losses

M, D, V = 23, 8, 40
Z_WEIGHT = 1e-2
AUTO = jax.sharding.AxisType.Auto


def inputs(scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden_MD = jnp.asarray(scale * rng.normal(size=(M, D)), dtype)
    head_DV = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets_M = jnp.asarray(rng.integers(0, 30, M), jnp.int32)
    weights_M = jnp.asarray(rng.integers(0, 3, M), jnp.float32)
    return hidden_MD, head_DV, targets_M, weights_M


def oracle(hidden_MD, head_DV, targets_M, weights_M):
    """Returns the three sums and the gradients of their first, in float64."""
    hidden, head, weights = (np.asarray(a, np.float64) for a in (hidden_MD, head_DV, weights_M))
    targets = np.asarray(targets_M)
    logits = hidden @ head
    top = logits.max(1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(1))
    rows = np.arange(len(targets))
    nll_sum = np.sum(weights * (lse - logits[rows, targets]))
    z_sum = Z_WEIGHT * np.sum(weights * lse**2)
    softmax = np.exp(logits - lse[:, None])
    dlogits = softmax * (weights * (1 + 2 * Z_WEIGHT * lse))[:, None]
    dlogits[rows, targets] -= weights
    return (nll_sum + z_sum, nll_sum, z_sum), (dlogits @ head.T, hidden.T @ dlogits)


def sums_and_gradients(hidden_MD, head_DV, targets_M, weights_M, *, chunk):
    def total(hidden_MD, head_DV, z_weight):
        sums = cross_entropy(
            hidden_MD, head_DV, targets_M, weights_M, z_weight=z_weight, chunk=chunk
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


@pytest.mark.parametrize("chunk", [1, 7, 22, M, 1000])
def test_matches_the_oracle(chunk):
    args = inputs()
    assert_matches(sums_and_gradients(*args, chunk=chunk), oracle(*args))


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


def split_sums_and_gradients(args, *, shards, chunk, factor):
    """As `sums_and_gradients`, columns split over `shards` devices and tokens over the others."""
    mesh = jax.make_mesh((8 // shards, shards), ("data", "vocab"), axis_types=(AUTO, AUTO))

    def local(hidden_MD, head_DV, targets_M, weights_M):
        options = dict(z_weight=Z_WEIGHT, chunk=chunk, vocab_axes=("vocab",))
        sums = cross_entropy(hidden_MD, head_DV, targets_M, weights_M, **options)
        return total(jnp.stack(sums), ("data",))

    def scaled(hidden_MD, head_DV):
        specs = P("data"), P(None, "vocab"), P("data"), P("data")
        run = jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)
        sums = run(hidden_MD, head_DV, *args[2:])
        return factor * sums[0], tuple(sums)

    with jax.set_mesh(mesh):
        grads, sums = jax.jit(jax.grad(scaled, argnums=(0, 1), has_aux=True))(*args[:2])
        return jax.device_get((sums, grads))


def inputs_with_gaps(dtype):
    """24 tokens: targets in every part of the columns, and outside of all where the weight is 0."""
    rng = np.random.default_rng(1)
    hidden_MD = jnp.asarray(rng.normal(size=(24, D)), dtype)
    head_DV = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets_M = np.arange(24, dtype=np.int32) * 5 % V
    weights_M = rng.integers(1, 3, 24).astype(np.float32)
    gaps = [3, 11, 20]
    targets_M[gaps], weights_M[gaps] = [-1, V, 2**31 - 1], 0
    return hidden_MD, head_DV, jnp.asarray(targets_M), jnp.asarray(weights_M)


@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize(
    ("shards", "chunk", "dtype"),
    [
        (2, 1, "float32"),
        (2, 4, "bfloat16"),
        (4, 5, "float32"),
        (8, 7, "float32"),
        (8, 1000, "float32"),
        (8, 9, "bfloat16"),
    ],
)
def test_columns_split_over_devices_change_nothing(shards, chunk, dtype):
    args = inputs_with_gaps(dtype)
    sums, grads = split_sums_and_gradients(args, shards=shards, chunk=chunk, factor=-3.0)
    assert grads[0].dtype == dtype and grads[1].dtype == jnp.float32
    rounded, targets_M = args[1].astype(dtype), np.clip(args[2], 0, V - 1)
    expected = oracle(args[0], rounded.astype(jnp.float32), targets_M, args[3])
    assert_matches(sums, expected[0])
    scaled = [-3 * gradient for gradient in expected[1]]
    assert_matches(grads, scaled, rtol=1e-2 if dtype == "bfloat16" else 2e-5)


@pytest.mark.usefixtures("compile_afresh")
def test_losses_of_split_columns_and_their_gradient_are_those_of_one_device():
    hidden_MD, head_DV, targets_M, _ = inputs_with_gaps("float32")
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(AUTO,))

    def losses(hidden_MD, head_DV, vocab_axes=()):
        return token_losses(hidden_MD, head_DV, targets_M, chunk=5, vocab_axes=vocab_axes)

    with jax.set_mesh(mesh):
        run = jax.shard_map(
            functools.partial(losses, vocab_axes=("vocab",)),
            in_specs=(P(), P(None, "vocab")),
            out_specs=P(),
            check_vma=False,
        )
        found, pullback = jax.vjp(jax.jit(run), hidden_MD, head_DV)
        found = jax.device_get((found, pullback(found)))
    expected, pullback = jax.vjp(jax.jit(losses), hidden_MD, head_DV)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4),
        found,
        (expected, pullback(expected)),
    )


def test_ranks_count_the_logits_that_are_no_smaller():
    hidden_MD, head_DV, targets_M, _ = inputs()
    logits = np.asarray(hidden_MD, np.float64) @ np.asarray(head_DV, np.float64)
    expected = (logits >= logits[np.arange(M), targets_M][:, None]).sum(1)
    for chunk in (1, 5, M):
        ranks = jax.jit(functools.partial(target_ranks, chunk=chunk))(hidden_MD, head_DV, targets_M)
        np.testing.assert_array_equal(ranks, expected)
    best = jnp.asarray(logits.argmax(1))
    assert (target_ranks(hidden_MD, head_DV, best, chunk=4) == 1).all()
    # Equal logits say nothing about what comes next.
    ranks = target_ranks(jnp.zeros((M, D)), head_DV, targets_M, chunk=4)
    np.testing.assert_array_equal(ranks, V)


@pytest.mark.usefixtures("compile_afresh")
def test_ranks_of_split_columns_are_those_of_one_device():
    hidden_MD, head_DV, targets_M, _ = inputs()
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(AUTO,))
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            functools.partial(target_ranks, targets_M=targets_M, chunk=7, vocab_axes=("vocab",)),
            in_specs=(P(), P(None, "vocab")),
            out_specs=P(),
            check_vma=False,
        )
        found = jax.device_get(jax.jit(run)(hidden_MD, head_DV))
    np.testing.assert_array_equal(found, target_ranks(hidden_MD, head_DV, targets_M, chunk=M))
