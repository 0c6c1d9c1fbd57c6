"""Every implementation of the routed experts against a float64 oracle, values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.experts import IMPLEMENTATIONS, routed_experts
from lightning_jax.ops.kernels.cpu import narrow
from lightning_jax.ops.routing import Routing, route

D, F = 12, 10
M, E, C = 37, 8, 4  # Most tests share one shape, and so one compilation.
GROUPED = ("blocked", "ragged_dot")
COTANGENT = np.random.default_rng(4).standard_normal((M, D))


def weights(experts, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((experts, D, F), (experts, D, F), (experts, F, D))
    return tuple((rng.standard_normal(s) * 0.3).astype(dtype) for s in shapes)


def tokens(count, dtype=np.float64, seed=1):
    return np.random.default_rng(seed).standard_normal((count, D)).astype(dtype)


def assignment(kind, count, experts, choices, seed=2):
    """expert_index_MC of a named shape; `experts` marks empty slots."""
    rng = np.random.default_rng(seed)
    index = np.argsort(rng.random((count, experts)), -1)[:, :choices]
    if kind == "ragged":
        index = np.where(np.arange(choices) < rng.integers(0, choices + 1, (count, 1)), index, -1)
    elif kind == "one_expert":
        index = np.where(np.arange(choices) == 0, experts - 1, -1) + 0 * index
    elif kind == "half_the_experts":
        index = index // 2 * 2
        index = np.where((index[:, :, None] == index[:, None, :]).argmax(-1) == np.arange(choices),
                         index, -1)  # fmt: skip
        index = -np.sort(-index, -1)
    elif kind == "padding":
        index = np.full_like(index, -1)
    return np.where(index < 0, experts, index).astype(np.int32)


def gates(index, experts, dtype=np.float64, seed=3):
    rng = np.random.default_rng(seed)
    return np.where(index < experts, rng.random(index.shape), 0.0).astype(dtype)


def oracle(x, index, gate, gate_w, up_w, down_w):
    """Output and gradients in float64, one expert at a time."""
    dy = COTANGENT[: len(x)]
    y, dx, dgate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    dws = [np.zeros_like(w) for w in (gate_w, up_w, down_w)]
    for e in range(len(gate_w)):
        m, c = np.nonzero(index == e)
        g, h, u = gate[m, c][:, None], x[m] @ gate_w[e], x[m] @ up_w[e]
        sigmoid = 1 / (1 + np.exp(-h))
        act = h * sigmoid * u
        dact = g * dy[m] @ down_w[e].T
        dh, du = dact * u * sigmoid * (1 + h * (1 - sigmoid)), dact * h * sigmoid
        np.add.at(y, m, g * act @ down_w[e])
        np.add.at(dx, m, dh @ gate_w[e].T + du @ up_w[e].T)
        dgate[m, c] = np.sum(act @ down_w[e] * dy[m], -1)
        for dw, value in zip(dws, (x[m].T @ dh, x[m].T @ du, act.T @ (g * dy[m])), strict=True):
            dw[e] = value
    return y, dx, dgate, *dws


@functools.partial(jax.jit, static_argnums=0)
def output_and_grads(implementation, x, index, gate, *w):
    def loss(x, gate, *w):
        unused_ME = jnp.zeros((len(index), len(w[0])))
        routing = Routing(index, gate, unused_ME, unused_ME)
        y = routed_experts(x, routing, *w, implementation=implementation)
        assert y.dtype == x.dtype and y.shape == x.shape
        return jnp.sum(y.astype(jnp.float32) * COTANGENT[: len(x)].astype(np.float32)), y

    grads, y = jax.grad(loss, argnums=range(5), has_aux=True)(x, gate, *w)
    return (y, *grads)


def run(implementation, x, index, gate, *w):
    return output_and_grads(implementation, *(jnp.asarray(a) for a in (x, index, gate, *w)))


def check(implementation, index, experts):
    x, w, gate = tokens(len(index)), weights(experts), gates(index, experts)
    single = [a.astype(np.float32) for a in (x, gate, *w)]
    got = run(implementation, single[0], index, *single[1:])
    expected = oracle(x, index, gate, *w)
    names = ("y", "dx", "dgate", "dgate_w", "dup_w", "ddown_w")
    for name, a, b in zip(names, got, expected, strict=True):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-5, err_msg=name)
    return got


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["full", "ragged", "one_expert", "half_the_experts", "padding"])
def test_matches_the_oracle(implementation, kind):
    got = check(implementation, assignment(kind, M, E, C), E)
    if kind == "padding":
        for value in got:
            np.testing.assert_array_equal(value, 0.0)


@pytest.mark.parametrize("implementation", GROUPED)
@pytest.mark.parametrize(
    ("count", "experts", "choices"), [(M, 1, 1), (M, 4, 2), (M, 64, 3), (1, E, 2)]
)
def test_matches_the_oracle_at_other_shapes(implementation, count, experts, choices):
    check(implementation, assignment("full", count, experts, choices), experts)


@pytest.mark.parametrize("implementation", GROUPED)
def test_empty_slots_have_no_gradient_even_with_a_gate(implementation):
    index = assignment("ragged", M, E, C)
    x, w = tokens(M, np.float32), weights(E, np.float32)
    gate = np.ones(index.shape, np.float32)
    got = run(implementation, x, index, gate, *w)
    expected = run(implementation, x, index, np.where(index < E, gate, 0), *w)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(got[2][index == E], 0.0)


@pytest.mark.parametrize("implementation", GROUPED)
def test_nan_padding_reaches_nothing(implementation):
    index = assignment("full", M, E, C)
    index[30:] = E
    x, w, gate = tokens(M, np.float32), weights(E, np.float32), gates(index, E, np.float32)
    x[30:] = np.nan
    for value in run(implementation, x, index, gate, *w):
        assert np.isfinite(value).all()


@pytest.mark.parametrize(
    ("implementation", "weight_dtype", "multiplied"),
    [
        ("blocked", jnp.bfloat16, False),
        ("blocked", jnp.bfloat16, True),
        ("blocked", jnp.float32, False),
        ("ragged_dot", jnp.bfloat16, False),
    ],
)
def test_bfloat16(implementation, weight_dtype, multiplied, monkeypatch):
    monkeypatch.setattr(narrow, "multiplies_bfloat16", lambda: multiplied)
    output_and_grads.clear_cache()
    index = assignment("ragged", M, E, C)
    x, *w = (jnp.asarray(a, jnp.bfloat16) for a in (tokens(M), *weights(E)))
    gate = gates(index, E)
    expected = oracle(*(np.asarray(a, np.float64) for a in (x,)), index, gate,
                      *(np.asarray(a, np.float64) for a in w))  # fmt: skip
    w = [a.astype(weight_dtype) for a in w]
    got = run(implementation, x, index, gate.astype(np.float32), *w)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=0.02 * np.abs(b).max())
    assert got[0].dtype == jnp.bfloat16 and got[3].dtype == weight_dtype


@pytest.mark.parametrize("implementation", GROUPED)
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_biases_and_the_clamped_unit_match_every_expert_on_every_token(implementation, clamp):
    index = assignment("ragged", M, E, C)
    x, gate = tokens(M, np.float32), gates(index, E, np.float32)
    w = weights(E, np.float32)
    rng = np.random.default_rng(5)
    biases = tuple(
        rng.standard_normal(shape).astype(np.float32)
        for shape in (w[0][:, 0].shape, w[1][:, 0].shape, w[2][:, 0].shape)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def output_and_grads(implementation, *args):
        def loss(x, gate, w, biases):
            unused_ME = jnp.zeros((M, E))
            routing = Routing(index, gate, unused_ME, unused_ME)
            y = routed_experts(
                x, routing, *w, biases=biases, clamp=clamp, implementation=implementation
            )
            return jnp.sum(y * COTANGENT[:M].astype(np.float32)), y

        grads, y = jax.grad(loss, argnums=range(4), has_aux=True)(*args)
        return y, grads

    got = output_and_grads(implementation, x, gate, w, biases)
    want = output_and_grads("onehot", x, np.where(index < E, gate, 0), w, biases)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-5)


def test_biases_of_the_wrong_shape_are_named():
    index, w = assignment("full", M, E, C), weights(E, np.float32)
    routing = Routing(index, gates(index, E, np.float32), jnp.zeros((M, E)), jnp.zeros((M, E)))
    with pytest.raises(ValueError, match="biases"):
        routed_experts(tokens(M, np.float32), routing, *w, biases=(np.zeros(3),) * 3)


def routed(logits, w, implementation, **options):
    routing = route(logits, **options)
    return routed_experts(jnp.asarray(tokens(M, np.float32)), routing, *w,
                          implementation=implementation)  # fmt: skip


@pytest.mark.parametrize("implementation", GROUPED)
def test_top_p_of_one_equals_dense(implementation):
    w = [jnp.asarray(a, jnp.float32) for a in weights(4)]
    logits = jnp.asarray(tokens(M, np.float32, seed=5)[:, :4])

    def value_and_grad(**options):
        def loss(logits):
            y = routed(logits, w, implementation, slots=4, **options)
            return jnp.sum(y**2)

        return jax.jit(jax.value_and_grad(loss))(logits)

    everything, dense = value_and_grad(kind="top_p"), value_and_grad(kind="dense")
    for a, b in zip(everything, dense, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", GROUPED)
def test_permuting_experts_changes_nothing(implementation):
    w = [jnp.asarray(a, jnp.float32) for a in weights(E)]
    logits = jnp.asarray(tokens(M, np.float32, seed=5)[:, :E])
    p = np.random.default_rng(6).permutation(E)
    y = jax.jit(lambda logits, w: routed(logits, w, implementation, kind="top_k", slots=3))
    np.testing.assert_allclose(y(logits, w), y(logits[:, p], [v[p] for v in w]), atol=1e-5)


def test_default_on_cpu_is_blocked_and_bad_arguments_are_named():
    x = jnp.asarray(tokens(M, np.float32))
    w = [jnp.asarray(a, jnp.float32) for a in weights(E)]
    routing = route(jnp.asarray(tokens(M, np.float32)[:, :E]), kind="top_k", slots=C)
    program = jax.jit(lambda x: routed_experts(x, routing, *w)).lower(x).as_text(debug_info=True)
    assert "experts_blocked" in program
    with pytest.raises(ValueError, match="implementation must be one of"):
        routed_experts(x, routing, *w, implementation="megablox")
    with pytest.raises(ValueError, match="down_EFD must have shape"):
        routed_experts(x, routing, *w[:2], w[1])
    with pytest.raises(ValueError, match="x_MD must have shape"):
        routed_experts(x[:5], routing, *w)
