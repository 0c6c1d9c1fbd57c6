"""Balance statistics, losses and controllers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.balance import (
    HIGHEST_P,
    LOWEST_P,
    ExchangeStats,
    balance_losses,
    control_top_p,
    routing_metrics,
    routing_stats,
    update_bias,
)
from lightning_jax.ops.routing import route

E = 8
LOSSES = ("switch", "group", "partition", "true_group", "z", "entropy")


def random_logits(tokens=60, scale=1.0, seed=0, experts=E):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((tokens, experts)) * scale, jnp.float32)


@functools.partial(jax.jit, static_argnames=("slots", "num_groups", "num_partitions"))
def compiled_stats(logits, mask, bias, *, slots, num_groups, num_partitions):
    routing = route(logits, kind="top_k", slots=slots, token_mask_M=mask, bias_E=bias)
    return routing_stats(routing, num_groups=num_groups, num_partitions=num_partitions)


# The optional arguments are always passed on, so that few programs are compiled.
def stats_of(logits, mask=None, bias=None, *, slots=2, num_groups=2, num_partitions=2):
    mask = jnp.ones(len(logits), bool) if mask is None else mask
    bias = jnp.zeros(logits.shape[1]) if bias is None else bias
    options = dict(slots=slots, num_groups=num_groups, num_partitions=num_partitions)
    return compiled_stats(logits, mask, bias, **options)


losses_of = jax.jit(balance_losses)
metrics_of = jax.jit(routing_metrics)


@jax.jit
def compiled_losses_and_grads(logits, mask, bias, counts):
    def losses(logits):
        values = balance_losses(stats_of(logits, mask, bias), counts)
        return values, values

    grads, values = jax.jacrev(losses, has_aux=True)(logits)
    return values, grads


def losses_and_grads(logits, mask=None, bias=None, counts=None):
    """Every loss of these tokens, and its gradient for the logits."""
    mask = jnp.ones(len(logits), bool) if mask is None else mask
    bias = jnp.zeros(logits.shape[1]) if bias is None else bias
    return compiled_losses_and_grads(logits, mask, bias, counts)


def add(*stats):
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *stats)


def numpy_within_groups(logits, index, groups):
    """The per-expert loss within groups, by loops in float64."""
    logits, index = np.asarray(logits, np.float64), np.asarray(index)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    size = logits.shape[1] // groups
    losses = []
    for g in range(groups):
        experts = range(g * size, (g + 1) * size)
        members = [m for m in range(len(p)) if set(index[m]) & set(experts)]
        count = np.array([(index == e).sum() for e in experts])
        inside = p[members][:, list(experts)]
        prob = (inside / inside.sum(-1, keepdims=True)).mean(0)
        losses.append(size * np.sum(count / count.sum() * prob))
    return np.mean(losses)


def test_losses_match_a_float64_oracle():
    logits = random_logits(scale=2.0)
    stats = stats_of(logits)
    losses = losses_of(stats)
    index = route(logits, kind="top_k", slots=2).choices.expert_index_MC
    x = np.asarray(logits, np.float64)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    top1 = np.bincount(p.argmax(-1), minlength=E) / len(p)
    share = np.bincount(np.asarray(index).ravel(), minlength=E) / index.size
    expected = {
        "switch": E * np.sum(top1 * p.mean(0)),
        "group": numpy_within_groups(x, index, 2),
        "partition": numpy_within_groups(x, index, 4),
        "true_group": 2 * np.sum(share.reshape(2, -1).sum(-1) * p.mean(0).reshape(2, -1).sum(-1)),
        "z": np.mean(np.log(np.exp(x).sum(-1)) ** 2),
        "entropy": np.mean(-np.sum(p * np.log(p), -1)),
    }
    assert set(losses) == set(LOSSES)
    for name, value in expected.items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-5, err_msg=name)
        assert losses[name].dtype == jnp.float32 and losses[name].shape == ()


def test_sigmoid_scores_are_balanced_by_their_shares():
    logits = random_logits(scale=2.0)

    @jax.jit
    def routed(logits):
        routing = route(logits, kind="top_k", slots=2, score="sigmoid")
        return routing, balance_losses(routing_stats(routing, num_groups=2, num_partitions=2))

    routing, losses = routed(logits)
    # The softmax of log-sigmoids is a sigmoid's share: the oracle takes those as its logits.
    x = -np.log1p(np.exp(-np.asarray(logits, np.float64)))
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    top1 = np.bincount(p.argmax(-1), minlength=E) / len(p)
    np.testing.assert_allclose(losses["switch"], E * np.sum(top1 * p.mean(0)), rtol=1e-5)
    group = numpy_within_groups(x, routing.choices.expert_index_MC, 2)
    np.testing.assert_allclose(losses["group"], group, rtol=1e-5)
    z = np.mean(np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2)
    np.testing.assert_allclose(losses["z"], z, rtol=1e-5)


def test_uniform_routing_gives_one():
    # Each token prefers its own expert, all experts alike.
    logits = 3.0 * jax.nn.one_hot(jnp.arange(64) % E, E)
    losses = losses_of(stats_of(logits, slots=1))
    np.testing.assert_allclose(losses["switch"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(losses["true_group"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(losses["group"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(losses["partition"], 1.0, rtol=1e-6)
    uniform = losses_of(stats_of(jnp.zeros((64, E)), slots=1))
    np.testing.assert_allclose(uniform["entropy"], np.log(E), rtol=1e-6)


def test_imbalance_inside_a_group_is_seen_by_group_and_partition_only():
    def losses(favourites):
        logits = 3.0 * jax.nn.one_hot(jnp.asarray(favourites)[jnp.arange(64) % 4], E)
        return losses_of(stats_of(logits, slots=1))

    balanced, skewed = losses([0, 1, 4, 5]), losses([0, 0, 4, 4])
    np.testing.assert_allclose(skewed["true_group"], balanced["true_group"], rtol=1e-6)
    assert skewed["group"] > balanced["group"] + 0.1
    assert skewed["partition"] > balanced["partition"] + 0.1
    between = losses([0, 1, 2, 3])
    assert between["true_group"] > balanced["true_group"] + 0.1


def test_probabilities_cover_all_experts_and_are_softmaxed_once():
    logits = random_logits(scale=6.0)
    stats = stats_of(logits)
    # All experts count, chosen or not, and their mass is that of one softmax of the logits.
    np.testing.assert_allclose(stats.prob_sum_E, jax.nn.softmax(logits).sum(0), rtol=1e-5)
    np.testing.assert_allclose(stats.prob_sum_E.sum(), 60, rtol=1e-5)
    grad = losses_and_grads(logits)[1]["switch"]
    unchosen = (
        jax.nn.one_hot(route(logits, kind="top_k", slots=2).choices.expert_index_MC, E).sum(1) == 0
    )
    assert float(jnp.abs(jnp.where(unchosen, grad, 0)).max()) > 0


def test_micro_batches_add_up_in_value_and_gradient():
    logits = random_logits(scale=2.0)
    # Uneven token counts, one part almost empty.
    mask = (jnp.arange(60) % 7 > 0) & ((jnp.arange(60) < 41) | (jnp.arange(60) > 57))
    values, grads = losses_and_grads(logits, mask)
    parts = [slice(0, 20), slice(20, 40), slice(40, 60)]
    total = add(*(stats_of(logits[part], mask[part]) for part in parts))
    split = [losses_and_grads(logits[p], mask[p], counts=total) for p in parts]
    for name in LOSSES:
        np.testing.assert_allclose(sum(v[name] for v, _ in split), values[name], rtol=1e-5)
        grad = grads[name]
        joined = jnp.concatenate([g[name] for _, g in split])
        np.testing.assert_allclose(joined, grad, rtol=1e-4, atol=1e-7)
        assert float(jnp.abs(grad).max()) > 1e-5
        np.testing.assert_array_equal(grad[~mask], 0.0)


def test_token_axes_need_not_be_flattened():
    logits, mask = random_logits(scale=2.0), jnp.arange(60) % 7 > 0

    @jax.jit
    def stats_and_grads(logits, mask):
        def loss(logits):
            routing = route(logits, kind="top_p", slots=3, top_p=0.7, token_mask_M=mask)
            stats = routing_stats(routing, mask, num_groups=2, num_partitions=2)
            return sum(balance_losses(stats).values()), stats

        return jax.grad(loss, has_aux=True)(logits)

    grad, stats = stats_and_grads(logits, mask)
    grad_BT, stats_BT = stats_and_grads(logits.reshape(4, 15, E), mask.reshape(4, 15))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats_BT, stats)
    np.testing.assert_allclose(grad_BT.reshape(60, E), grad, atol=1e-6)


def test_descending_a_loss_lowers_it():
    logits = random_logits() + jnp.linspace(0, 2, E)[None, :]
    values, grads = losses_and_grads(logits)
    for name in LOSSES:
        lower = losses_of(stats_of(logits - grads[name]))[name]
        assert lower < values[name], name


def test_masked_tokens_count_for_nothing():
    logits = random_logits()
    mask = jnp.arange(60) < 40
    masked, short = stats_of(logits, mask), stats_of(logits[:40])
    routing = route(logits, kind="top_k", slots=2)
    later = jax.jit(lambda r, m: routing_stats(r, m, num_groups=2, num_partitions=2))(routing, mask)
    for other in (masked, later):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), other, short)


def test_no_tokens_gives_zero_and_finite_gradients():
    mask = jnp.zeros(60, bool)
    values, grads = losses_and_grads(random_logits(), mask)
    for name in LOSSES:
        assert values[name] == 0
        np.testing.assert_array_equal(grads[name], 0.0)
    for metric in metrics_of(stats_of(random_logits(), mask)).values():
        assert bool(jnp.all(jnp.isfinite(metric)))


def test_extreme_logits_stay_finite():
    # A chosen group whose probabilities all underflow: selected through the bias alone.
    logits = random_logits().at[:, 4:].add(-200.0)
    values, grads = losses_and_grads(logits, bias=jnp.where(jnp.arange(E) >= 4, 2.0, 0.0))
    for name in LOSSES:
        assert np.isfinite(values[name]) and bool(jnp.all(jnp.isfinite(grads[name])))


def test_metrics():
    logits = jnp.log(jnp.asarray([[0.6, 0.3, 0.06, 0.04], [0.9, 0.05, 0.03, 0.02]]))
    stats = jax.jit(lambda x: routing_stats(route(x, kind="top_p", slots=3, top_p=0.8)))(logits)
    metrics = metrics_of(stats)
    np.testing.assert_allclose(metrics["mean_experts"], 1.5)
    np.testing.assert_allclose(metrics["load_max_over_mean"], 2 / 0.75)
    np.testing.assert_allclose(metrics["dead_experts"], 2)
    np.testing.assert_allclose(metrics["kept_mass"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(metrics["histogram"], [0, 0.5, 0.5, 0])
    np.testing.assert_allclose(stats.top1_count_E, [2, 0, 0, 0])
    assert all(value.dtype == jnp.float32 for value in metrics.values())


def test_everything_works_with_a_layer_axis():
    logits = jnp.stack([random_logits(seed=s) for s in range(3)])

    @jax.jit
    @jax.vmap
    def per_layer(logits):
        stats = stats_of(logits)
        bias = update_bias(jnp.zeros(E), stats.assigned_count_E, rate=0.1)
        return balance_losses(stats), routing_metrics(stats), bias

    losses, metrics, bias = per_layer(logits)
    for layer in range(3):
        single = stats_of(logits[layer])
        for name, value in losses_of(single).items():
            np.testing.assert_allclose(losses[name][layer], value, rtol=1e-6)
        for name, value in metrics_of(single).items():
            np.testing.assert_allclose(metrics[name][layer], value, rtol=1e-6)
        expected = update_bias(jnp.zeros(E), single.assigned_count_E, rate=0.1)
        np.testing.assert_allclose(bias[layer], expected, atol=1e-7)


@pytest.mark.parametrize(
    "grouping", [dict(num_groups=3), dict(num_groups=2, num_partitions=3), dict(num_groups=0)]
)
def test_groupings_must_divide(grouping):
    with pytest.raises(ValueError, match="num_groups"):
        stats_of(random_logits(), **grouping)


def test_bias_is_centred_and_evens_the_load():
    logits = random_logits(tokens=512) + jnp.linspace(0, 2, E)[None, :]
    bias = jnp.zeros(E)

    @jax.jit
    def step(bias):
        load = stats_of(logits, None, bias).assigned_count_E
        return update_bias(bias, load, rate=0.003), load

    before = step(bias)[1]
    for _ in range(100):
        bias, after = step(bias)
        assert abs(float(bias.mean())) < 1e-6
    assert after.max() / after.mean() < 1.2 < before.max() / before.mean()
    np.testing.assert_allclose(update_bias(bias, jnp.full(E, 3.0), rate=0.1), bias, atol=1e-7)


@functools.partial(jax.jit, static_argnames=("slots", "steps"))
def controlled(logits, top_p, target, *, slots, steps=300, kp=0.0, ki=0.5):
    """Mean experts per token, and p, of `steps` steps on the same tokens."""

    def step(state, _):
        routing = route(logits, kind="top_p", slots=slots, top_p=state[0])
        used = routing.choices.filled_MC.sum(-1).mean(dtype=jnp.float32)
        return control_top_p(*state, used, target=target, kp=kp, ki=ki), (used, state[0])

    return jax.lax.scan(step, (top_p, jnp.float32(0)), length=steps)[1]


# Case D10
@pytest.mark.parametrize("experts", [16, 64])
@pytest.mark.parametrize("std", [0.01, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize(("kp", "ki"), [(0.0, 0.5), (0.5, 0.2)])
def test_controller_reaches_its_target_and_stays(experts, std, kp, ki):
    logits = random_logits(1024, std, experts=experts)
    for start in (0.05, 0.4, 1.0):
        used, top_p = controlled(logits, jnp.float32(start), 3.0, slots=8, kp=kp, ki=ki)
        np.testing.assert_allclose(used[200:], 3.0, rtol=0.05)
        assert float(jnp.ptp(top_p[200:])) < 5e-3 and float(top_p[1:].max()) < 1


# Case D10
def test_controller_follows_a_router_that_sharpens():
    logits, state, used = random_logits(1024, experts=16), (jnp.float32(0.4), jnp.float32(0)), []

    @jax.jit
    def step(state, std):
        routing = route(std * logits, kind="top_p", slots=8, top_p=state[0])
        mean = routing.choices.filled_MC.sum(-1).mean(dtype=jnp.float32)
        return control_top_p(*state, mean, target=3.0, kp=0.0, ki=0.5), mean

    for std in np.geomspace(0.1, 12, 400):
        state, mean = step(state, std)
        used.append(float(mean))
    assert min(used[20:]) > 2.5 and max(used[20:]) < 3.5


# Case D10
@pytest.mark.parametrize(("std", "target", "reached"), [(40.0, 6.0, 2.5), (1e-3, 1.0, 1.0)])
def test_a_target_out_of_reach_saturates_and_does_not_wind_up(std, target, reached):
    logits = random_logits(1024, std, experts=16)
    used, top_p = controlled(logits, jnp.float32(0.4), target, slots=8)
    np.testing.assert_allclose(used[100:], used[-1])
    assert used[-1] <= reached and LOWEST_P <= top_p[-1] <= HIGHEST_P
    # However long it was out of reach, one step moves p as far as ever.
    moved, _ = control_top_p(top_p[-1], jnp.float32(0), 2 * target, target=target, kp=0.0, ki=0.5)
    back, _ = control_top_p(top_p[-1], jnp.float32(0), target / 2, target=target, kp=0.0, ki=0.5)
    assert moved < top_p[-1] or top_p[-1] == np.float32(LOWEST_P)
    assert back > top_p[-1] or top_p[-1] == np.float32(HIGHEST_P)


def test_a_batch_without_tokens_does_not_move_p():
    p, error = control_top_p(jnp.float32(0.3), jnp.float32(0), 0.0, target=3.0, kp=0.5, ki=0.5)
    np.testing.assert_allclose(p, 0.3, rtol=1e-6)
    assert error == 0


def test_metrics_of_an_exchange_add_up():
    """Two micro-batches: 30 rows for four parts, 10 dropped, 3 rounds in 2 passes."""
    plain = stats_of(random_logits())
    assert "rows_sent" not in metrics_of(plain)

    def stats(sent, dropped, rounds):
        values = (jnp.array(sent), 7.0, dropped, rounds, 1.0)
        return dataclasses.replace(plain, exchange=ExchangeStats(*map(jnp.float32, values)))

    found = metrics_of(add(stats([9, 1, 2, 3], 8, 2), stats([6, 4, 3, 2], 2, 1)))
    assert found["rows_sent"] == 30 and found["exchange_rounds"] == 1.5
    np.testing.assert_allclose(found["part_max_over_mean"], 15 / 7.5)
    np.testing.assert_allclose(found["dropped_share"], 10 / 40)
    nothing = metrics_of(stats([0, 0, 0, 0], 0, 0))
    assert nothing["part_max_over_mean"] == nothing["dropped_share"] == 0
