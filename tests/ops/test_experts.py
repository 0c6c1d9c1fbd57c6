"""The routed experts and their three parts against float64 oracles, values and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops import experts
from lightning_jax.ops.experts import (
    combine,
    dispatch,
    grouped_mlp,
    routed_experts,
)
from lightning_jax.ops.kernels.cpu import narrow
from lightning_jax.ops.routing import Choices, route
from lightning_jax.runtime.target import Target
from tests.ops.expert_oracle import (
    COTANGENT,
    D,
    M,
    assignment,
    expert_biases,
    gates,
    oracle,
    tokens,
    weights,
)

E, C = 8, 4  # Most tests share one shape, and so one compilation.
GROUPED = ("blocked", "ragged_dot")
# Those that a CPU can run; the others have tests of their own.
RUNNABLE = ("onehot", *GROUPED)


@functools.partial(jax.jit, static_argnums=0)
def output_and_grads(implementation, x, index, gate, *w):
    def loss(x, gate, *w):
        choices = Choices(index, gate, len(w[0]))
        y = routed_experts(x, choices, *w, implementation=implementation)
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


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("kind", ["full", "ragged", "one_expert", "half_the_experts", "padding"])
def test_matches_the_oracle(implementation, kind):
    got = check(implementation, assignment(kind, M, E, C), E)
    if kind == "padding":
        for value in got:
            np.testing.assert_array_equal(value, 0.0)


@pytest.mark.parametrize("implementation", GROUPED)
@pytest.mark.parametrize(
    ("count", "experts", "choices"),
    [(M, 1, 1), pytest.param(M, 4, 2, marks=pytest.mark.slow), (M, 64, 3), (1, E, 2)],
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
    biases = expert_biases(E)

    @functools.partial(jax.jit, static_argnums=0)
    def output_and_grads(implementation, *args):
        def loss(x, gate, w, biases):
            y = routed_experts(
                x,
                Choices(index, gate, E),
                *w,
                biases=biases,
                clamp=clamp,
                implementation=implementation,
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
    choices = Choices(index, gates(index, E, np.float32), E)
    with pytest.raises(ValueError, match="biases"):
        routed_experts(tokens(M, np.float32), choices, *w, biases=(np.zeros(3),) * 3)


def routed(logits, w, implementation, **options):
    choices, _ = route(logits, **options)
    return routed_experts(jnp.asarray(tokens(M, np.float32)), choices, *w,
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
    choices, _ = route(jnp.asarray(tokens(M, np.float32)[:, :E]), kind="top_k", slots=C)
    program = jax.jit(lambda x: routed_experts(x, choices, *w)).lower(x).as_text(debug_info=True)
    assert "experts_blocked" in program
    with pytest.raises(ValueError, match="implementation must be one of"):
        routed_experts(x, choices, *w, implementation="megablox")
    with pytest.raises(ValueError, match="down_EFD must have shape"):
        routed_experts(x, choices, *w[:2], w[1])
    with pytest.raises(ValueError, match="x_MD must have shape"):
        routed_experts(x[:5], choices, *w)


def pulled(function, arguments, cotangent):
    """Output and gradients of `function`."""
    y, pull = jax.vjp(function, *arguments)
    return y, *pull(cotangent)


ROUTED_KINDS = ["full", "ragged", "one_expert", "padding"]


@pytest.mark.parametrize("kind", ROUTED_KINDS)
def test_dispatch_copies_the_rows_of_each_expert_in_token_order(kind):
    index = assignment(kind, M, E, C)
    choices = Choices(jnp.asarray(index), jnp.zeros(index.shape), E)
    x = jnp.asarray(tokens(M, np.float32))
    rows, order = jax.jit(dispatch)(x, choices)
    expected = np.concatenate([np.nonzero((index == e).any(-1))[0] for e in range(E)])
    assert rows.shape == (M * C, D)
    np.testing.assert_array_equal(rows[: len(expected)], x[expected])
    np.testing.assert_array_equal(order.size_E, [(index == e).sum() for e in range(E)])

    drows = np.random.default_rng(6).standard_normal(rows.shape).astype(np.float32)
    _, dx = jax.jit(
        lambda x, d: pulled(lambda x: dispatch(x, choices)[0], (x,), d),
    )(x, drows)
    want = np.zeros((M, D))
    np.add.at(want, expected, drows[: len(expected)])
    np.testing.assert_allclose(dx, want, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ROUTED_KINDS)
def test_combine_weighs_rows_by_gates_and_ignores_empty_slots(kind, dtype):
    index = assignment(kind, M, E, C)
    _, order = dispatch(jnp.zeros((M, D)), Choices(jnp.asarray(index), jnp.zeros(index.shape), E))
    rng = np.random.default_rng(7)
    rows = jnp.asarray(rng.standard_normal((M * C, D)), dtype)
    gate = rng.random(index.shape).astype(np.float32)  # Empty slots have one too.
    y, drows, dgate = jax.jit(
        lambda rows, gate, dy: pulled(lambda r, g: combine(r, g, order), (rows, gate), dy)
    )(rows, gate, COTANGENT.astype(dtype))
    assert y.dtype == drows.dtype == dtype and dgate.dtype == jnp.float32
    real = np.where(index < E, gate, 0).astype(np.float64)
    wide, dy = np.asarray(rows, np.float64), np.asarray(COTANGENT.astype(dtype), np.float64)
    by_slot = wide[np.asarray(order.position_MC)]
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    want = np.einsum("mc,mcd->md", real, by_slot)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=tolerance)
    want = np.zeros_like(wide)
    want[np.asarray(order.position_MC)] = real[..., None] * dy[:, None]
    np.testing.assert_allclose(np.asarray(drows, np.float64), want, atol=tolerance)
    want = np.where(index < E, np.einsum("mcd,md->mc", by_slot, dy), 0)
    np.testing.assert_allclose(dgate, want, atol=1e-4)


SIZES = {
    "some_empty": (5, 0, 9, 1, 0, 12, 3, 0),
    "full": (4, 4, 4, 4, 4, 4, 4, 9),
    "one_of_eight": (0, 0, 0, M, 0, 0, 0, 0),
    "no_row": (0,) * 8,
    "one_expert": (20,),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def grouped_and_grads(implementation, clamp, size, dy, rows, w, biases):
    def function(rows, w, biases):
        return grouped_mlp(
            rows, size, *w, biases=biases, clamp=clamp, implementation=implementation
        )

    return pulled(function, (rows, w, biases), dy)


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("name", SIZES)
def test_grouped_mlp_matches_the_oracle_and_reads_no_row_past_the_last_group(name, implementation):
    size = np.asarray(SIZES[name], np.int32)
    count, experts, filled = M, len(size), size.sum()
    index = np.full((count, 1), experts)
    index[:filled, 0] = np.repeat(np.arange(experts), size)
    x, w = tokens(count), weights(experts)
    single = [a.astype(np.float32) for a in (COTANGENT, x, *w)]
    for tail in single[:2]:
        tail[filled:] = np.nan
    dy, rows, *single = single
    y, drows, dw, _ = grouped_and_grads(implementation, None, size, dy, rows, tuple(single), ())
    expected = oracle(x, index, (index < experts).astype(float), *w)
    for a, b in zip((y, drows, *dw), (*expected[:2], *expected[3:]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3))
    for tail in (y, drows):
        np.testing.assert_array_equal(tail[filled:], 0.0)


@pytest.mark.parametrize("implementation", GROUPED)
@pytest.mark.parametrize("name", ["some_empty", "no_row"])
def test_biases_of_the_grouped_mlp_get_the_sum_of_their_rows(name, implementation):
    size = np.asarray(SIZES[name], np.int32)
    dy, rows, *w = (a.astype(np.float32) for a in (COTANGENT, tokens(M), *weights(E)))
    arguments = (size, dy, rows, tuple(w), expert_biases(E))
    got = grouped_and_grads(implementation, 0.5, *arguments)
    want = grouped_and_grads("onehot", 0.5, *arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize("implementation", GROUPED)
def test_a_transport_fits_between_the_parts(implementation):
    """Two peers with half of the experts each, their rows in buffers with room to spare."""
    index = assignment("ragged", M, E, C)
    x, w = jnp.asarray(tokens(M, np.float32)), weights(E, np.float32)
    choices = Choices(jnp.asarray(index), jnp.asarray(gates(index, E, np.float32)), E)

    @jax.jit
    def exchanged(x, w):
        rows, order = dispatch(x, choices)
        size_PE = order.size_E.reshape(2, -1)
        start = jnp.asarray([0, size_PE[0].sum()])
        slot_S = jnp.arange(M * C)
        back = jnp.zeros_like(rows)
        for peer in range(2):
            w_peer = [a.reshape(2, -1, *a.shape[1:])[peer] for a in w]
            received = rows[jnp.minimum(start[peer] + slot_S, M * C - 1)]
            y = grouped_mlp(received, size_PE[peer], *w_peer, implementation=implementation)
            mine = (slot_S >= start[peer]) & (slot_S < start[peer] + size_PE[peer].sum())
            back = jnp.where(mine[:, None], y[slot_S - start[peer]], back)
        return combine(back, choices.gate_MC, order)

    want = oracle(tokens(M), index, gates(index, E), *weights(E))[0]
    np.testing.assert_allclose(exchanged(x, w), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_a_unit_of_stacked_weights_equals_those_weights(implementation):
    index = assignment("ragged", M, E, C)
    choices = Choices(jnp.asarray(index), jnp.asarray(gates(index, E, np.float32)), E)
    x = jnp.asarray(tokens(M, np.float32))
    stack = [np.stack([w, 2 * w, -w]) for w in weights(E, np.float32)]
    stack += expert_biases(E, lead=(3,))

    @jax.jit
    def output_and_grads(unit, x, *params):
        def function(x, *params):
            return routed_experts(
                x,
                choices,
                *params[:3],
                biases=params[3:],
                unit=unit,
                implementation=implementation,
            )

        return pulled(function, (x, *params), jnp.asarray(COTANGENT, jnp.float32))

    for unit in (0, 2):
        want = output_and_grads(None, x, *(a[unit] for a in stack))
        got = output_and_grads(jnp.int32(unit), x, *stack)
        for a, b in zip(got[:2], want[:2], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        for a, b in zip(got[2:], want[2:], strict=True):
            np.testing.assert_allclose(a[unit], b, atol=1e-5)
            np.testing.assert_array_equal(np.delete(a, unit, axis=0), 0.0)


def test_stacked_weights_need_a_unit_and_a_unit_stacked_weights():
    index = assignment("full", M, E, C)
    choices = Choices(index, gates(index, E, np.float32), E)
    x, w = tokens(M, np.float32), weights(E, np.float32)
    with pytest.raises(ValueError, match="gate_EDF must have shape"):
        routed_experts(x, choices, *w, unit=jnp.int32(0))
    with pytest.raises(ValueError, match="gate_EDF must have shape"):
        routed_experts(x, choices, *(a[None] for a in w))
    with pytest.raises(ValueError, match="implementation must be one of"):
        grouped_mlp(x, jnp.zeros(E, jnp.int32), *w, implementation="ragged")


def test_no_gradient_of_ragged_dot_is_a_scatter_add():
    """On an accelerator its sums have no order, and another result on every run."""
    index = assignment("ragged", M, E, C)
    choices = Choices(index, jnp.asarray(gates(index, E, np.float32)), E)

    def loss(x, gate, w, biases):
        mine = dataclasses.replace(choices, gate_MC=gate)
        return routed_experts(x, mine, *w, biases=biases, implementation="ragged_dot").sum()

    arguments = (tokens(M, np.float32), choices.gate_MC, weights(E, np.float32), expert_biases(E))
    assert "scatter-add" not in str(jax.make_jaxpr(jax.grad(loss, range(4)))(*arguments))


def test_ragged_dot_keeps_no_mask_of_the_filled_rows_for_the_backward_pass():
    size_E = jnp.zeros(E, jnp.int32)
    _, pull = jax.vjp(
        lambda x, *w: grouped_mlp(x, size_E, *w, implementation="ragged_dot"),
        *(jnp.asarray(a) for a in (tokens(M, np.float32), *weights(E, np.float32))),
    )
    assert not [a.shape for a in jax.tree.leaves(pull) if a.dtype == bool]


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "choice"),
    [
        ("cpu", jnp.bfloat16, 512, "blocked"),
        ("tpu", jnp.bfloat16, 512, "pallas_tpu"),
        ("tpu", jnp.bfloat16, 2**16, "ragged_dot"),
        ("tpu", jnp.float16, 512, "ragged_dot"),
        ("gpu", jnp.float16, 512, "pallas_gpu"),
        ("gpu", jnp.float32, 2**16, "pallas_gpu"),
    ],
)
def test_the_default_is_what_the_target_the_dtype_and_the_width_allow(
    platform, dtype, width, choice, monkeypatch, caplog
):
    monkeypatch.setattr(experts.target, "current", lambda: Target(platform, "any"))
    caplog.set_level("DEBUG")
    for shape in ((E, width, 64), (E, 64, width)):
        assert experts._resolve(None, 8192, dtype, jax.ShapeDtypeStruct(shape, dtype)) == choice
    assert caplog.text.count(f"on {platform}: {choice}") == 2
    assert caplog.text.count("MiB of fast memory") == (
        2 if width > 512 and platform == "tpu" else 0
    )


def test_a_named_kernel_refuses_a_dtype_that_it_does_not_take():
    w = [a.astype(np.float16) for a in weights(E)]
    with pytest.raises(ValueError, match="pallas_tpu: dtypes float16"):
        grouped_mlp(tokens(M, np.float16), jnp.zeros(E, jnp.int32), *w, implementation="pallas_tpu")
