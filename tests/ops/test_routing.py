"""Router selection, gates and the slot order."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.routing import limit_capacity, ordered_sum, route, sort_slots


def random_logits(tokens=64, experts=8, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((tokens, experts)) * scale, jnp.float32)


def softmax64(logits):
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def chosen_sets(routing):
    E, index = routing.choices.num_experts, np.asarray(routing.choices.expert_index_MC)
    return [frozenset(int(e) for e in row if e < E) for row in index]


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_top_k_chooses_the_most_probable(slots):
    logits = random_logits()
    routing = route(logits, kind="top_k", slots=slots)
    expected = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :slots]
    np.testing.assert_array_equal(routing.choices.expert_index_MC, expected)
    gates = np.take_along_axis(softmax64(logits), expected, -1)
    np.testing.assert_allclose(routing.choices.gate_MC, gates, rtol=1e-5)
    assert routing.choices.expert_index_MC.dtype == jnp.int32
    for array in (routing.choices.gate_MC, routing.scores.logits_ME, routing.scores.probs_ME):
        assert array.dtype == jnp.float32
    np.testing.assert_allclose(routing.scores.probs_ME.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_top_p_takes_the_smallest_sufficient_set(top_p, scale):
    logits = random_logits(scale=scale)
    routing = route(logits, kind="top_p", slots=8, top_p=top_p)
    used = np.asarray(routing.choices.filled_MC).sum(-1)
    sorted_p = -np.sort(-softmax64(logits), axis=-1)
    reached = np.cumsum(sorted_p, -1)
    for m, k in enumerate(used):
        assert k >= 1
        assert reached[m, k - 1] >= top_p - 1e-6
        assert k == 1 or reached[m, k - 2] < top_p + 1e-6
    assert bool(jnp.all(routing.choices.filled_MC[:, :-1] >= routing.choices.filled_MC[:, 1:]))
    assert bool(jnp.all(jnp.where(routing.choices.filled_MC, True, routing.choices.gate_MC == 0)))


def test_top_p_never_exceeds_its_slots():
    routing = route(random_logits(scale=0.01), kind="top_p", slots=3, top_p=0.9)
    np.testing.assert_array_equal(routing.choices.filled_MC.sum(-1), 3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 60.0])
def test_top_p_of_one_is_everything_despite_rounding(scale):
    routing = route(random_logits(experts=64, scale=scale), kind="top_p", slots=64, top_p=1.0)
    assert bool(jnp.all(routing.choices.filled_MC))
    dense = route(routing.scores.logits_ME, kind="dense", slots=64)
    order = jnp.argsort(routing.choices.expert_index_MC, axis=-1)
    np.testing.assert_array_equal(
        jnp.take_along_axis(routing.choices.gate_MC, order, axis=-1), dense.choices.gate_MC
    )


def test_top_p_may_be_traced():
    logits = random_logits()
    traced = jax.jit(lambda p: route(logits, kind="top_p", slots=4, top_p=p))
    for top_p in (0.2, 0.7, 1.0):
        expected = route(logits, kind="top_p", slots=4, top_p=top_p)
        got = traced(jnp.float32(top_p))
        np.testing.assert_array_equal(got.choices.expert_index_MC, expected.choices.expert_index_MC)
    assert bool(jnp.all(traced(jnp.float32(0.0)).choices.filled_MC.sum(-1) == 1))


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_each_token_may_have_its_own_top_p(slots):
    logits = random_logits()
    top_p = np.random.default_rng(1).random(64).astype(np.float32) * 1.2
    # No mass to reach, and none that can be: one expert and all of them.
    top_p[:3] = 0.0, np.nan, 1.0
    routing = jax.jit(lambda p: route(logits, kind="top_p", slots=slots, top_p=p))(top_p)
    one_by_one = jax.jit(lambda x, p: route(x, kind="top_p", slots=slots, top_p=p))
    for m in range(64):
        one = one_by_one(logits[m : m + 1], top_p[m])
        jax.tree.map(
            lambda a, b, m=m: np.testing.assert_allclose(a[m], b[0], rtol=1e-6), routing, one
        )
    np.testing.assert_array_equal(routing.choices.filled_MC.sum(-1)[:3], [1, 1, slots])


@pytest.mark.parametrize("kind", ["top_k", "top_p", "dense"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_token_axes_need_not_be_flattened(kind, score):
    logits, mask = random_logits(), jnp.arange(64) % 3 > 0
    top_p = jnp.linspace(0.1, 1.0, 64)
    slots, bias = 8 if kind == "dense" else 3, jnp.linspace(0, 0.5, 8)

    @jax.jit
    def value_and_grad(logits, mask, top_p):
        def loss(logits):
            routing = route(
                logits,
                kind=kind,
                slots=slots,
                score=score,
                top_p=top_p,
                bias_E=bias,
                renormalize=True,
                token_mask_M=mask,
            )
            return jnp.sum(routing.choices.gate_MC**2) + jnp.sum(
                routing.scores.probs_ME**2
            ), routing

        return jax.grad(loss, has_aux=True)(logits)

    flat = value_and_grad(logits, mask, top_p)
    apart = value_and_grad(*(a.reshape(4, 16, *a.shape[1:]) for a in (logits, mask, top_p)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-6), apart, flat
    )


def test_dense_is_every_expert_in_index_order():
    logits = random_logits()
    routing = route(logits, kind="dense", slots=8)
    np.testing.assert_array_equal(routing.choices.expert_index_MC, np.tile(np.arange(8), (64, 1)))
    np.testing.assert_array_equal(routing.choices.gate_MC, routing.scores.probs_ME)


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
def test_permuting_experts_permutes_the_choice(kind):
    logits = random_logits()
    permutation = np.random.default_rng(1).permutation(8)
    a = route(logits, kind=kind, slots=3, top_p=0.6)
    b = route(logits[:, permutation], kind=kind, slots=3, top_p=0.6)
    back = np.append(permutation, 8)[np.asarray(b.choices.expert_index_MC)]
    np.testing.assert_array_equal(a.choices.expert_index_MC, back)
    np.testing.assert_allclose(a.choices.gate_MC, b.choices.gate_MC, rtol=1e-6)


def test_ties_go_to_the_lower_index():
    routing = route(jnp.zeros((5, 8)), kind="top_k", slots=3)
    np.testing.assert_array_equal(routing.choices.expert_index_MC, np.tile([0, 1, 2], (5, 1)))


@pytest.mark.parametrize("kind", ["top_k", "top_p", "dense"])
def test_renormalized_gates_sum_to_one(kind):
    logits = random_logits()
    slots = 8 if kind == "dense" else 3
    raw = route(logits, kind=kind, slots=slots, top_p=0.5)
    norm = route(logits, kind=kind, slots=slots, top_p=0.5, renormalize=True)
    np.testing.assert_allclose(norm.choices.gate_MC.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        norm.choices.gate_MC,
        raw.choices.gate_MC / raw.choices.gate_MC.sum(-1, keepdims=True),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(norm.choices.expert_index_MC, raw.choices.expert_index_MC)


def test_bias_orders_the_selection_and_nothing_else():
    logits = random_logits()
    bias = jnp.zeros(8).at[5].set(10.0)
    routing = route(logits, kind="top_k", slots=2, bias_E=bias)
    np.testing.assert_array_equal(routing.choices.expert_index_MC[:, 0], 5)
    np.testing.assert_array_equal(routing.choices.gate_MC[:, 0], routing.scores.probs_ME[:, 5])

    @functools.partial(jax.grad, argnums=(0, 1))
    def grads(bias, logits):
        return route(logits, kind="top_p", slots=4, top_p=0.5, bias_E=bias).choices.gate_MC.sum()

    dbias, dlogits = jax.jit(grads)(bias, logits)
    np.testing.assert_array_equal(dbias, 0.0)
    assert float(jnp.abs(dlogits).max()) > 0

    # The mass counted towards p is the unbiased one, in the biased order.
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    bias = jnp.asarray([0.0, 0.0, 0.0, 1.0])
    routing = route(logits, kind="top_p", slots=4, top_p=0.5, bias_E=bias)
    np.testing.assert_array_equal(routing.choices.expert_index_MC, [[3, 0, 4, 4]])


def test_sigmoid_scores_are_gates_and_their_shares_the_mass():
    logits, bias = random_logits(), jnp.asarray([0.0] * 7 + [2.0])
    scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    routing = route(logits, kind="top_k", slots=3, score="sigmoid", bias_E=bias)
    index = np.asarray(routing.choices.expert_index_MC)
    assert (index[:, 0] == 7).all()
    np.testing.assert_allclose(
        routing.choices.gate_MC, np.take_along_axis(scores, index, -1), rtol=1e-5
    )
    mass = scores / scores.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.scores.probs_ME, mass, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(routing.scores.log_scores_ME), mass, rtol=1e-5)
    nucleus = route(logits, kind="top_p", slots=8, score="sigmoid", top_p=0.4)
    reached = np.cumsum(-np.sort(-mass, axis=-1), -1)
    np.testing.assert_array_equal(nucleus.choices.filled_MC.sum(-1), (reached < 0.4).sum(-1) + 1)
    one = route(logits, kind="top_k", slots=3, score="sigmoid", renormalize=True)
    np.testing.assert_allclose(one.choices.gate_MC.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("kind", ["top_k", "top_p", "dense"])
def test_padding_is_empty_and_has_no_gradient(kind):
    mask = jnp.arange(64) % 3 > 0
    # NaN in padding must reach neither values nor gradients.
    logits = jnp.where(mask[:, None], random_logits(), jnp.nan)
    slots = 8 if kind == "dense" else 3

    def loss(logits):
        routing = route(
            logits, kind=kind, slots=slots, top_p=0.7, renormalize=True, token_mask_M=mask
        )
        probs_loss = jnp.sum(routing.scores.probs_ME**2) + jnp.sum(routing.scores.logits_ME**2)
        return jnp.sum(routing.choices.gate_MC**2) + probs_loss, routing

    grad, routing = jax.jit(jax.grad(loss, has_aux=True))(logits)
    np.testing.assert_array_equal(routing.choices.expert_index_MC[~mask], 8)
    np.testing.assert_array_equal(routing.choices.gate_MC[~mask], 0.0)
    np.testing.assert_array_equal(grad[~mask], 0.0)
    assert bool(jnp.all(jnp.isfinite(grad)))
    assert float(jnp.abs(grad[mask]).max()) > 0


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
@pytest.mark.parametrize(("experts", "slots"), [(1, 1), (8, 1), (8, 8)])
def test_no_token_or_one_expert(kind, experts, slots):
    logits = random_logits(experts=experts)
    routing = route(logits, kind=kind, slots=slots, top_p=0.5, token_mask_M=jnp.zeros(64, bool))
    np.testing.assert_array_equal(routing.choices.expert_index_MC, experts)
    np.testing.assert_array_equal(routing.choices.gate_MC, 0.0)
    routing = route(logits, kind=kind, slots=slots, top_p=0.5)
    assert bool(jnp.all(routing.choices.filled_MC[:, 0]))
    if experts == 1:
        np.testing.assert_array_equal(routing.choices.gate_MC, 1.0)


def test_bfloat16_logits_are_routed_in_float32():
    logits = random_logits(experts=64, scale=0.01).astype(jnp.bfloat16)
    a = route(logits, kind="top_p", slots=64, top_p=0.4)
    b = route(logits.astype(jnp.float32), kind="top_p", slots=64, top_p=0.4)
    assert chosen_sets(a) == chosen_sets(b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 9}, "slots must be from 1 to the number of experts, 8, got 9"),
        ({"slots": 0}, "got 0"),
        ({"kind": "topp"}, 'did you mean "top_p"'),
        ({"score": "softmx"}, 'did you mean "softmax"'),
        ({"kind": "dense"}, "dense routing needs slots = experts = 8"),
        ({"kind": "top_p", "top_p": 0.0}, "top_p must be above 0"),
        ({"kind": "top_p", "top_p": jnp.ones(8)}, "top_p must be a scalar or have shape (64,)"),
        ({"bias_E": jnp.zeros(7)}, "bias_E must have shape"),
        ({"token_mask_M": jnp.zeros(64)}, "token_mask_M must be bool"),
    ],
)
def test_bad_arguments_name_the_field(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        route(random_logits(), **{"kind": "top_k", "slots": 2, **change})


def test_sort_slots_is_stable_and_inverts():
    index = jnp.asarray([[2, 0], [3, 3], [0, 2], [1, 3]], jnp.int32)
    order = sort_slots(index, 3)
    np.testing.assert_array_equal(order.slot_S, [1, 4, 6, 0, 5, 2, 3, 7])
    np.testing.assert_array_equal(order.slot_S[order.position_MC.reshape(-1)], np.arange(8))
    np.testing.assert_array_equal(order.size_E, [2, 1, 2])
    np.testing.assert_array_equal(order.end_E, [2, 3, 5])
    np.testing.assert_array_equal(order.token_S, np.asarray(order.slot_S) // 2)


@pytest.mark.parametrize("choices", [1, 2, 13])
def test_ordered_sum(choices):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 4)).astype(np.float32)
    position = rng.integers(0, 30, (7, choices))
    weight = rng.random((7, choices)).astype(np.float32)
    expected = np.einsum("mc,mcd->md", weight, rows[position])
    np.testing.assert_allclose(ordered_sum(jnp.asarray(rows), position, weight), expected, 1e-5)


def choose_in_groups(scores, bias, groups, most, slots):
    """The experts of one token by loops: best groups by their two best, then best experts."""
    biased = scores + bias
    size = len(scores) // groups
    worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: (-worth[g], g))[:most]
    among = [e for e in range(len(scores)) if e // size in best]
    return sorted(among, key=lambda e: (-biased[e], e))[:slots]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("groups", "most"), [(8, 3), (4, 1), (4, 2), (16, 4), (1, 1)])
def test_experts_come_from_the_best_groups(score, groups, most):
    logits, slots = random_logits(experts=16, tokens=40), 4
    bias = 0.2 * np.random.default_rng(1).standard_normal(16).astype(np.float32)
    limit = dict(slots=slots, score=score, bias_E=jnp.asarray(bias))
    options = dict(limit, num_groups=groups, max_groups=most)
    chosen = route(logits, kind="top_k", **options).choices
    scores = softmax64(logits) if score == "softmax" else 1 / (1 + np.exp(-np.asarray(logits)))
    shares = scores / scores.sum(-1, keepdims=True)
    expected = [choose_in_groups(row, bias, groups, most, slots) for row in scores]
    np.testing.assert_array_equal(chosen.expert_index_MC, expected)
    np.testing.assert_allclose(
        chosen.gate_MC, np.take_along_axis(scores, np.array(expected), -1), rtol=1e-5
    )
    # The mass of top-p is that of all experts: what is outside of the groups counts as missing.
    prefix = np.asarray(route(logits, kind="top_p", top_p=0.4, **options).choices.filled_MC)
    before = np.cumsum(np.take_along_axis(shares, np.array(expected), -1), -1)
    np.testing.assert_array_equal(prefix[:, 1:], before[:, :-1] < 0.4)
    if groups == most:
        free = route(logits, kind="top_k", **limit).choices
        np.testing.assert_array_equal(chosen.expert_index_MC, free.expert_index_MC)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_groups=3), "num_groups must divide the number of experts, 8, got 3"),
        (dict(num_groups=4, max_groups=5), "max_groups must be from 0 to num_groups = 4, got 5"),
        (dict(num_groups=4, max_groups=1), "max_groups = 1 groups of 2 experts are too few for 4"),
    ],
)
def test_groups_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        route(random_logits(), kind="top_k", slots=4, **options)


def test_a_capacity_empties_the_slots_of_later_tokens():
    rows, tokens, experts, capacity = 3, 20, 4, 5
    logits = random_logits(rows * tokens, experts).reshape(rows, tokens, experts)
    mask = jnp.arange(tokens)[None] % 7 != jnp.arange(rows)[:, None]
    before = route(logits, kind="top_p", slots=3, top_p=0.7, token_mask_M=mask).choices
    after = limit_capacity(before, capacity)
    expected = np.array(before.expert_index_MC)
    for row in expected:
        used = [0] * experts
        for token in row:
            for c, e in enumerate(token):
                if e < experts:
                    used[e] += 1
                    token[c] = e if used[e] <= capacity else experts
    np.testing.assert_array_equal(after.expert_index_MC, expected)
    kept = expected < experts
    np.testing.assert_array_equal(after.gate_MC, np.where(kept, before.gate_MC, 0))
    assert 0 < kept.sum() < before.filled_MC.sum()
    grad = jax.grad(lambda gate: limit_capacity(dataclasses.replace(before, gate_MC=gate), capacity)
                    .gate_MC.sum())(before.gate_MC)  # fmt: skip
    np.testing.assert_array_equal(grad, kept)
